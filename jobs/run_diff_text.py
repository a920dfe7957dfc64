"""What `diff` found, for people: one table, and one line for each limit that is passed."""

from __future__ import annotations

import math
from typing import Any

_SHOWN_LABELS = 30
_WIDTH = 20


def diff_lines(report: dict[str, Any]) -> list[str]:
    """The report of `run_diff.read_diff`."""
    lines = [f"{side}  {_side(report[side])}" for side in ("a", "b")]
    lines += ["", f"{'':{_WIDTH}}       a        b    shift  by chance"]
    lines += _labels(report["label"])
    if (found := report["confidence"]) is not None:
        lines.append(_line("confidence, mean", [f"{mean:.3f}" for mean in found["means"]], found))
    for name, found in report["tokens"].items():
        if found is not None:
            means = [f"{mean:,.1f}" for mean in found["means"]]
            lines.append(_line(f"{name} tokens, mean", means, found, percent=True))
    for found in report["routing"] or ():
        lines.append(_line(f"routing, layer {found['layer']}", ["", ""], found))
    if not report["routing"]:
        lines.append("routing: not recorded in both")
    lines += ["", *(_verdict(each) for each in report["exceeded"])]
    if not report["exceeded"]:
        limits = [name for name, limit in report["limits"].items() if limit is not None]
        lines.append(
            f"within the limits on {', '.join(limits)}" if limits else "no limit is set: see `drift` in a spec"
        )
    return lines


def _labels(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [_line("labels", ["", ""], found)]
    ranked = sorted(found["shares"].items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    lines += [f"  {name[: _WIDTH - 2]:{_WIDTH - 2}}  {a:6.1%}   {b:6.1%}" for name, (a, b) in ranked[:_SHOWN_LABELS]]
    if len(ranked) > _SHOWN_LABELS:
        lines.append(f"  ... and {len(ranked) - _SHOWN_LABELS:,} labels that changed less; --json has all")
    return lines


def _line(name: str, values: list[str], found: dict[str, Any], *, percent: bool = False) -> str:
    figures = [_number(found[key], percent=percent) for key in ("shift", "by_chance")]
    return f"{name:{_WIDTH}} {values[0]:>7}  {values[1]:>7}  {figures[0]:>7}    {figures[1]:>7}"


def _verdict(each: dict[str, Any]) -> str:
    percent = "tokens" in each["what"]
    shift, limit = (_number(each[key], percent=percent) for key in ("shift", "limit"))
    return f"drift: {each['what']} moved by {shift}, more than the {limit} that the spec allows"


def _number(value: float, *, percent: bool) -> str:
    if math.isinf(value):
        return "from 0"
    return f"{value:.1%}" if percent else f"{value:.3f}"


def _side(side: dict[str, Any]) -> str:
    return f"{side['output']}: {side['rows']:,} rows, run {side['run_id']}"
