"""What the runs of a comparison say: medians over repetitions, steady rates, and ratios. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

RATES = ("steady_tokens_per_s", "steady_to_bare", "wall_s", "start_s", "first_row_s", "most_rows_s", "after_start_s")
COSTS = ("cpu_ms_per_row", "outside_ms_per_row", "peak_mib")
Key = tuple[str, str, str]
"""Model, workload, contestant."""


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, float]]:
    """Figures by model, workload and contestant, from runs of sizes `start`, `short` and `long`.

    Processor time per row is the long run's less the short one's, so that start-up cancels there too.
    """
    by_size: dict[Key, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_size[run["model"], run["workload"], run["who"]][run["size"]].append(run)
    found = {key: _figures(sizes) for key, sizes in by_size.items()}
    for (model, workload, _), figures in found.items():
        bare = found.get((model, workload, "bare"))
        if bare:
            figures["steady_to_bare"] = figures["steady_tokens_per_s"] / bare["steady_tokens_per_s"]
    return found


def _figures(sizes: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    def mid(size: str, name: str) -> float:
        return median(run[name] for run in sizes[size])

    def grown(name: str) -> float:
        return mid("long", name) - mid("short", name)

    rows = grown("rows")
    cpu, engine = grown("cpu_s"), grown("engine_cpu_s")
    return {
        "steady_tokens_per_s": grown("tokens") / grown("wall_s"),
        "wall_s": mid("long", "wall_s"),
        "start_s": mid("start", "wall_s"),
        "after_start_s": mid("long", "wall_s") - mid("start", "wall_s"),
        "first_row_s": mid("long", "first_row_s"),
        "most_rows_s": mid("long", "most_rows_s"),
        "cpu_ms_per_row": 1000 * cpu / rows,
        "outside_ms_per_row": 1000 * (cpu - engine) / rows,
        "peak_mib": mid("long", "peak_mib"),
    }


def as_markdown(about: Mapping[str, Any], found: Mapping[Key, Mapping[str, float]]) -> str:
    """One table a model and workload, with what it was measured on above it."""
    lines = [f"{about['hardware']}; {about['versions']}; {about['commit']}, {about['date']}; `{about['command']}`"]
    columns = (*RATES, *COSTS)
    for group in dict.fromkeys((model, workload) for model, workload, _ in found):
        lines += ["", f"| {group[0]}, {group[1]} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for (*own, who), figures in found.items():
            if tuple(own) == group:
                cells = (f"{figures[name]:,.2f}" if name in figures else "" for name in columns)
                lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
