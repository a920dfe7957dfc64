"""Problems -> one SpecError that shows them all: file, line and column, the line itself with a caret, and the cure.

Owns how a problem is located and displayed. Knows nothing of what is right or wrong in a spec.
Guarantees:
- problems come in the order of the file, those of `--set` last, and all are there (of more than 100, the first).
- a problem inside something that is itself a problem is left to the outer one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.yaml_source import Document, FieldPath, Mark, Problem
from pipeline.errors import SpecError

# A file that is no spec at all, e.g. a data file, has as many errors as keys.
MOST_SHOWN = 100
_LINE_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Located:
    """A problem and its place: a mark in the file, or the text of a `--set`."""

    problem: Problem
    mark: Mark | None
    override: str | None


def spec_error(problems: Sequence[Problem], document: Document, overrides: Mapping[FieldPath, str]) -> SpecError:
    """The one error that reports all problems. `overrides` maps the path of each `--set` to its text."""
    located = sorted((_locate(problem, document, overrides) for problem in problems), key=_order)
    blocks = list(dict.fromkeys(_block(one, document) for one in located[:MOST_SHOWN]))
    count = f"{len(blocks)} errors" if len(located) < MOST_SHOWN else f"more errors than {MOST_SHOWN}; the first are"
    head = [f"{document.name}: {count}"] if len(blocks) > 1 else []
    return SpecError("\n".join([*head, *blocks]))


def without_consequences(problems: Sequence[Problem], causes: Sequence[Problem]) -> list[Problem]:
    """`problems` less those at or below the path of a cause, e.g. a wrong type where an alias was refused."""
    paths = {cause.path for cause in causes}
    return [
        problem
        for problem in problems
        if not any(problem.path[:length] in paths for length in range(len(problem.path) + 1))
    ]


def _order(located: Located) -> tuple[int, int]:
    return (located.mark.line, located.mark.column) if located.mark else (1 << 60, 0)


def _locate(problem: Problem, document: Document, overrides: Mapping[FieldPath, str]) -> Located:
    if problem.override is not None:
        return Located(problem, None, problem.override)
    if problem.mark is not None:
        return Located(problem, problem.mark, None)
    if (text := _override_of(problem.path, document, overrides)) is not None:
        return Located(problem, None, text)
    return Located(problem, _mark_of(problem, document), None)


def _override_of(path: FieldPath, document: Document, overrides: Mapping[FieldPath, str]) -> str | None:
    """Text of the last `--set` that set the path or something around it, or that alone made what is at the path."""
    around = [text for owner, text in overrides.items() if path[: len(owner)] == owner]
    if around:
        return around[-1]
    if path in document.keys or path in document.values:
        return None
    return next((text for owner, text in overrides.items() if owner[: len(path)] == path), None)


def _mark_of(problem: Problem, document: Document) -> Mark:
    path = problem.path
    primary = document.keys if problem.on_key else document.values
    if path in primary:
        return _line_in_value(primary[path], problem, document)
    while path and path not in document.keys and path not in document.values:
        path = path[:-1]
    return document.keys.get(path) or document.values.get(path) or Mark(1, 1)


def _line_in_value(mark: Mark, problem: Problem, document: Document) -> Mark:
    """Only a `|` block keeps its lines; in a folded or quoted value the mark of the value must do."""
    scalar = document.scalars.get(problem.path)
    if problem.line_in_value is None or scalar is None or scalar.style != "|":
        return mark
    line = min(mark.line + problem.line_in_value, len(document.lines))
    text = document.lines[line - 1]
    return Mark(line, len(text) - len(text.lstrip()) + 1, max(1, len(text.strip())))


def _block(located: Located, document: Document) -> str:
    problem, mark = located.problem, located.mark
    hint = [f"        {problem.hint}"] if problem.hint else []
    if mark is None:
        return "\n".join([f"--set {located.override}: {problem.message}", *hint])
    head = f"{document.name}:{mark.line}:{mark.column}: {problem.message}"
    return "\n".join([head, *_excerpt(document.lines, mark), *hint])


def _excerpt(lines: Sequence[str], mark: Mark) -> list[str]:
    line = lines[mark.line - 1] if mark.line <= len(lines) else ""
    if not line.strip():
        return []
    start = max(0, mark.column - _LINE_WIDTH // 2) if len(line) > _LINE_WIDTH else 0
    shown = line[start : start + _LINE_WIDTH]
    before = shown[: mark.column - 1 - start]
    width = max(1, min(mark.width, len(shown) - len(before)))
    padding = "".join(_blank(character) for character in before)
    return [f"{mark.line:>5} | {shown}", f"      | {padding}{'^' * width}"]


def _blank(character: str) -> str:
    """As wide on a terminal as the character above it."""
    if character == "\t":
        return "\t"
    return "" if unicodedata.combining(character) else " " * (1 + (unicodedata.east_asian_width(character) in "WF"))
