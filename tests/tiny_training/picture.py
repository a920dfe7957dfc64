"""Draws a table of distances as an SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

CELL, LEFT, TOP = 44, 150, 110


def heat_map(names: Sequence[str], values: Sequence[Sequence[float]], *, title: str) -> str:
    """An SVG of a square table of values from 0 to 1; darker is larger, relative to the largest."""
    largest = max((value for row in values for value in row), default=0.0) or 1.0
    width, height = LEFT + CELL * len(names) + 10, TOP + CELL * len(names) + 10
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect {size} fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for index, name in enumerate(names):
        middle = CELL * index + CELL / 2
        parts.append(f'<text x="{LEFT - 6}" y="{TOP + middle + 4}" text-anchor="end">{escape(name)}</text>')
        x, y = LEFT + middle, TOP - 6
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-45 {x} {y})">{escape(name)}</text>')
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            parts += _cell(column, row, value, value / largest)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(column: int, row: int, value: float, depth: float) -> list[str]:
    x, y = LEFT + CELL * column, TOP + CELL * row
    shade = round(255 - 175 * depth)
    ink = "white" if depth > 0.6 else "black"
    return [
        f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="rgb({shade},{shade},255)" stroke="white"/>',
        f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 4}" text-anchor="middle" fill="{ink}">{value:.2f}</text>',
    ]
