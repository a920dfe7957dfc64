"""`diff`: what changed from one run to the next in labels, confidence, lengths and routing, against the spec's limits.

Reads both runs' parts, a few columns at a time, and `routing/`; writes nothing. Invariant: a limit that can't be held
against anything is an error, never passed in silence.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.chain import read_chain
from jobs.claiming import whether_finished
from jobs.drift import EXPERTS
from jobs.label_report import given_labels, label_column
from jobs.run import SPEC
from jobs.shifts import Histogram, Moments, Shift, distribution_shift, mean_shift, share_shift
from jobs.spec import load_spec
from jobs.status import job_output_of, output_of
from jobs.summary import read_summary
from pipeline.counters import ALL
from pipeline.errors import SpecError
from pipeline.labels import CONFIDENCE
from pipeline.parts import DATA, committed_parts
from pipeline.routing_report import drift_by_slice
from pipeline.settings import DriftSettings
from pipeline.storage import Store

ABSTAINED = "(none)"
_TOKENS = {"input": "num_input_tokens", "generated": "num_generated_tokens"}
_ROWS_AT_ONCE = 65536


@dataclass(slots=True)
class Side:
    """What one run's rows add up to."""

    store: Store
    summary: dict[str, Any]
    labels: Counter[str] = field(default_factory=Counter)
    confidence: Histogram = field(default_factory=Histogram)
    tokens: dict[str, Moments] = field(default_factory=lambda: {name: Moments() for name in _TOKENS})
    experts: pa.Table | None = None
    """`routing/experts.parquet`; None when no routing was recorded."""

    def describe(self) -> dict[str, Any]:
        """For the report."""
        rows = self.summary["counts"]["committed_rows"]
        return {"output": self.store.root, "run_id": self.summary["run_id"], "rows": rows}


def read_diff(first: str, second: str | None, *, spec: str | None = None) -> dict[str, Any]:
    """Compare two runs, or the last two of an incremental job; `exit_code` says whether a limit is passed.

    Args:
        first: an output directory, URL or spec; of an incremental job the latest run is meant.
        second: the same; None for the last two runs of the incremental job `first`.
        spec: where the limits are; by default in what the second run was started with.

    Raises:
        SpecError: one isn't a finished run, or a limit is set for what they don't have.
    """
    before, after = (output_of(first), output_of(second)) if second is not None else last_two(first)
    a, b = _read_side(Store(before)), _read_side(Store(after))
    limits = load_spec(Path(spec), runs_files=False).drift if spec is not None else _limits_of(b.store)
    report = {"a": a.describe(), "b": b.describe(), **_compare(a, b)}
    exceeded = _exceeded(report, limits)
    return {**report, "limits": limits.model_dump(), "exceeded": exceeded, "exit_code": 1 if exceeded else 0}


def last_two(text: str) -> tuple[str, str]:
    """The outputs of the last two finished runs of an incremental job.

    Raises:
        SpecError: there are fewer.
    """
    store = Store(job_output_of(text))
    chain = read_chain(store)
    finished = [link for link in chain.effective if link.released is None and whether_finished(chain, link)]
    if len(finished) < 2:
        raise SpecError(
            f"{store.root} has {len(finished)} finished runs of a job with input.new: since_last_run; a diff needs "
            "two: name both, or wait for the next one"
        )
    return chain.run_store(finished[-2]).root, chain.run_store(finished[-1]).root


def _read_side(store: Store) -> Side:
    summary = read_summary(store)
    if summary is None or summary["counts"]["missing_rows"]:
        raise SpecError(f"{store.root} holds no finished run; give the output directory, URL or spec of one")
    side = Side(store, summary)
    for name in sorted(committed_parts(store)):
        with store.open(f"{DATA}/{name}") as handle, pq.ParquetFile(handle) as part:
            columns = [*_TOKENS.values()]
            if CONFIDENCE in part.schema_arrow.names:
                columns += [label_column(part.schema_arrow.names), CONFIDENCE]
            for batch in part.iter_batches(_ROWS_AT_ONCE, columns=columns):
                _add(side, batch)
    if not summary["routing"]["off_because"]:
        try:
            side.experts = pq.read_table(pa.BufferReader(store.read(EXPERTS)))
        except FileNotFoundError:
            side.experts = None  # no row has routing
    return side


def _add(side: Side, batch: pa.RecordBatch) -> None:
    for name, column in _TOKENS.items():
        side.tokens[name].add(batch[column].drop_null().to_numpy().astype(np.float64))
    if CONFIDENCE not in batch.schema.names:
        return
    labelled = batch.filter(pc.is_valid(batch[CONFIDENCE]))
    side.confidence.add(labelled[CONFIDENCE].to_numpy(zero_copy_only=False).astype(np.float64))
    for value in labelled[label_column(batch.schema.names)].to_pylist():
        side.labels.update(given_labels(value) or [ABSTAINED])


def _compare(a: Side, b: Side) -> dict[str, Any]:
    """Each comparison, or None where one of the two has nothing to compare."""
    is_labelled = bool(a.labels and b.labels)
    return {
        "label": _labels(a.labels, b.labels) if is_labelled else None,
        "confidence": _confidence(a.confidence, b.confidence) if is_labelled else None,
        "tokens": {name: _tokens(a.tokens[name], b.tokens[name]) for name in _TOKENS},
        "routing": _routing(a.experts, b.experts) if a.experts is not None and b.experts is not None else None,
    }


def _labels(a: Counter[str], b: Counter[str]) -> dict[str, Any]:
    shares = {name: [side[name] / side.total() for side in (a, b)] for name in sorted({*a, *b})}
    return {**_figures(share_shift(a, b)), "shares": shares}


def _confidence(a: Histogram, b: Histogram) -> dict[str, Any]:
    return {**_figures(distribution_shift(a, b)), "means": [a.moments.mean, b.moments.mean]}


def _tokens(a: Moments, b: Moments) -> dict[str, Any] | None:
    if not (a.count and b.count):
        return None
    return {**_figures(mean_shift(a, b)), "means": [a.mean, b.mean]}


def _routing(a: pa.Table, b: pa.Table) -> list[dict[str, Any]]:
    """Layer by layer, all tokens together."""
    rows = drift_by_slice(a, b).to_pylist()
    whole = [row for row in rows if row["slice"] == ALL and row["phase"] == "all" and row["distance"] is not None]
    return [{"layer": row["layer"], **_figures(Shift(row["distance"], row["expected_by_chance"]))} for row in whole]


def _figures(shift: Shift) -> dict[str, float]:
    return {"shift": shift.size, "by_chance": shift.by_chance}


def _exceeded(report: dict[str, Any], limits: DriftSettings) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in type(limits).model_fields:
        threshold = getattr(limits, name)
        if threshold is None:
            continue
        figures = _all_figures(name, report[name])
        if not figures:
            raise SpecError(
                f"drift.{name} is {threshold}, but {report['a']['output']} and {report['b']['output']} don't both have "
                f"{name} to compare; set drift.{name} to null, or compare runs that do"
            )
        for what, each in figures.items():
            if Shift(each["shift"], each["by_chance"]).exceeds(threshold):
                found.append({"what": what, "limit": threshold, "shift": each["shift"], "by_chance": each["by_chance"]})
    return found


def _all_figures(name: str, compared: Any) -> dict[str, dict[str, float]]:
    """Each shift that a limit holds for, by what it is of."""
    if not compared:
        return {}
    if name == "routing":
        return {f"routing, layer {each['layer']}": each for each in compared}
    if name == "tokens":
        return {f"{kind} tokens": each for kind, each in compared.items() if each is not None}
    return {name: compared}


def _limits_of(store: Store) -> DriftSettings:
    """From the spec that a run was started with."""
    try:
        stored = json.loads(store.read(SPEC))
    except FileNotFoundError:
        return DriftSettings()
    return DriftSettings.model_validate(stored.get("drift", {}))
