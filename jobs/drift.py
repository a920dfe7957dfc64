"""How differently two finished outputs used their experts: layer by layer, phase by phase, slice by slice.

Reads `summary.json` and `routing/experts.parquet` of both and writes nothing; what is measured, and against what,
`pipeline.routing_report.drift` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.status import output_of
from jobs.summary import read_summary
from pipeline.counters import ALL
from pipeline.errors import SpecError
from pipeline.routing_report import drift_by_slice, slice_names
from pipeline.storage import Store

EXPERTS = "routing/experts.parquet"
SHOWN_SLICES = 20


@dataclass(frozen=True, slots=True)
class _Side:
    output: str
    summary: dict[str, Any]
    experts: pa.Table

    @property
    def slices(self) -> set[str]:
        return slice_names(self.experts) - {ALL}

    def describe(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "run_id": self.summary["run_id"],
            "model": self.summary["model"]["source"],
            "rows": self.summary["counts"]["committed_rows"],
        }


def read_drift(a: str, b: str) -> dict[str, Any]:
    """Compare the outputs (or those of the specs) named so; `drift` in the report is `drift_by_slice`, row by row.

    Raises:
        SpecError: one isn't a finished run or has no routing, or their models differ in layers or experts.
    """
    left, right = _read_side(a), _read_side(b)
    return {
        "a": left.describe(),
        "b": right.describe(),
        "drift": drift_by_slice(left.experts, right.experts).to_pylist(),
        "slices_only_in_a": sorted(left.slices - right.slices),
        "slices_only_in_b": sorted(right.slices - left.slices),
    }


def drift_lines(report: dict[str, Any]) -> list[str]:
    """The same for people: every layer of the whole, and where each slice differs most."""
    lines = [
        f"a  {_side(report['a'])}",
        f"b  {_side(report['b'])}",
        "",
        "Jensen-Shannon distance of the experts' shares: 0 is equal, 1 disjoint; about `by chance` is no drift",
        "layer     all  prompt  completion  by chance",
    ]
    cells = {(row["slice"], row["phase"], row["layer"]): row for row in report["drift"]}
    for layer in sorted({layer for _, _, layer in cells}):
        whole, prompt, completion = (cells[ALL, phase, layer] for phase in ("all", "prompt", "completion"))
        lines.append(
            f"{layer:5}   {_number(whole['distance'])}   {_number(prompt['distance'])}       "
            f"{_number(completion['distance'])}      {_number(whole['expected_by_chance'])}"
        )
    return lines + _slice_lines(report)


def _slice_lines(report: dict[str, Any]) -> list[str]:
    worst: dict[str, dict[str, Any]] = {}
    for row in report["drift"]:
        if row["slice"] != ALL and row["phase"] == "all" and row["distance"] is not None:
            worst[row["slice"]] = max(worst.get(row["slice"], row), row, key=lambda row: float(row["distance"]))
    ranked = sorted(worst.values(), key=lambda row: (-row["distance"], row["slice"]))
    lines = ["", "largest  in layer  by chance  slice"] if ranked else []
    for row in ranked[:SHOWN_SLICES]:
        numbers = f"  {_number(row['distance'])}  {row['layer']:8}      {_number(row['expected_by_chance'])}"
        lines.append(f"{numbers}  {row['slice']}")
    if len(ranked) > SHOWN_SLICES:
        lines.append(f"... and {len(ranked) - SHOWN_SLICES:,} slices that differ less; --json has all")
    if report["slices_only_in_a"] or report["slices_only_in_b"]:
        lines.append("")
    for side in ("a", "b"):
        if names := report[f"slices_only_in_{side}"]:
            shown = ", ".join(names[:SHOWN_SLICES]) + (", ..." if len(names) > SHOWN_SLICES else "")
            lines.append(f"only in {side}: {shown}")
    return lines


def _read_side(text: str) -> _Side:
    store = Store(output_of(text))
    summary = read_summary(store)
    if summary is None:
        raise SpecError(
            f"{store.root} holds no finished run; give the output directory or URL, or the spec, of a run that is done"
        )
    counts = summary["counts"]
    if counts["missing_rows"]:
        raise SpecError(
            f"{counts['missing_rows']:,} of {counts['input_rows']:,} rows have no result yet in {store.root}; drift "
            "compares finished runs: `tramontane run` does the missing rows first"
        )
    if summary["routing"]["off_because"]:
        raise SpecError(
            f"{store.root} has no routing to compare: {summary['routing']['off_because']}; give runs of "
            "mixture-of-experts models with routing.level counts or tokens"
        )
    try:
        data = store.read(EXPERTS)
    except FileNotFoundError:
        raise SpecError(f"{store.root} has no {EXPERTS}: none of its rows has routing; give another output") from None
    return _Side(store.root, summary, pq.read_table(pa.BufferReader(data)))


def _side(side: dict[str, Any]) -> str:
    return f"{side['output']}: {side['rows']:,} rows, model {side['model']}, run {side['run_id']}"


def _number(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"
