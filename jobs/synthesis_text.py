"""What came of a synthesis, for people."""

from __future__ import annotations

from typing import Any

_FIGURES = ("distinct_1", "distinct_2", "distinct_3", "self_similarity")


def synthesis_lines(summary: dict[str, Any]) -> list[str]:
    """What came of a synthesis, for people; nothing for other jobs."""
    if "synthesis" not in summary:
        return []
    report = summary["synthesis"]
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in report["dropped"].items()) or "none"
    lines = [
        f"  round {number}   {each['asked_again']:,} asked again, {each['mended']:,} mended"
        for number, each in enumerate(report["rounds"], start=1)
    ]
    if steps := report.get("steps"):
        tokens = [sum(step[name] for step in steps) for name in ("input", "generated")]
        lines.append(f"  steps     {len(steps)} more runs: {tokens[0]:,} tokens in, {tokens[1]:,} out on top")
    lines.append(f"  records   {report['records']:,}; dropped: {dropped}")
    if "broke_off" in report:
        places = ", ".join(f"{place}: {count:,}" for place, count in report["broke_off"].items())
        lines.append(f"  talks     broke off in {places}")
    if "scores" in report:
        scores = ", ".join(f"{score}: {count:,}" for score, count in report["scores"].items()) or "none"
        lines.append(f"  judge     {scores}")
    figures = report["diversity"]
    shown = [f"{name} {figures[name]:g}" for name in _FIGURES if figures[name] is not None]
    shown += [f"{name} {each['drawn']:,} of {each['of']:,}" for name, each in figures["coverage"].items()]
    return [*lines, f"  diversity {', '.join(shown)}"] if shown else lines
