"""Outcomes of one shard -> its output rows and their counters.

Pure: pyarrow and numpy only. Invariant: one input row gives its samples or one failed row, always of the same schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.counters import ALL, RunCounters, SampleFacts, slice_name
from pipeline.dispatcher import Outcome
from pipeline.engine import MoeShape, Timing
from pipeline.replica import ReducedSample
from pipeline.routing_columns import routing_column
from pipeline.rows import ERROR, FILE, MAX_ERROR_CHARS, PROMPT_IDS, REPAIRS, ROW
from pipeline.settings import RoutingSettings

STAGE = "generate"


@dataclass(slots=True)
class _Columns:
    """Output rows under construction, one list per column."""

    take: list[int] = field(default_factory=list)
    """Position of each output row's input row in the shard."""
    sample_index: list[int] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    generated_text: list[str | None] = field(default_factory=list)
    finish_reason: list[str | None] = field(default_factory=list)
    stop_reason: list[str | None] = field(default_factory=list)
    num_cached_tokens: list[int | None] = field(default_factory=list)
    num_generated_tokens: list[int | None] = field(default_factory=list)
    cumulative_logprob: list[float | None] = field(default_factory=list)
    error: list[dict[str, Any] | None] = field(default_factory=list)
    timing: list[dict[str, float] | None] = field(default_factory=list)
    routing: list[ReducedSample | None] = field(default_factory=list)

    def add_failure(self, position: int, error: dict[str, Any]) -> None:
        """Append the single output row of a failed input row."""
        self._add(position, 0, "failed", None, None, None, None, None, None, error, None, None)

    def add_sample(self, position: int, sample: ReducedSample, num_cached: int, timing: Timing) -> None:
        """Append one sample's output row."""
        self._add(
            position,
            sample.index,
            sample_status(sample),
            sample.text,
            sample.finish_reason,
            sample.stop_reason,
            num_cached,
            sample.num_generated_tokens,
            sample.cumulative_logprob,
            None,
            {"queue_s": timing.queue_s, "first_token_s": timing.first_token_s, "total_s": timing.total_s},
            sample,
        )

    def _add(self, *values: Any) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            getattr(self, name).append(value)


OWN_COLUMNS = frozenset(_Columns.__slots__) - {"take"}


@dataclass(frozen=True, slots=True)
class ResultBuilder:
    """Builds the output of shards under one run's settings."""

    schema: pa.Schema
    """Of every part; see `rows.output_schema`."""
    routing: RoutingSettings
    moe: MoeShape | None

    def build(self, prompts: pa.Table, outcomes: Sequence[Outcome | None]) -> tuple[pa.Table, RunCounters]:
        """Return the shard's output rows and counters; `outcomes` are in the row order of `prompts`."""
        columns, counters = _Columns(), RunCounters()
        lengths = _prompt_lengths(prompts)
        slices = self._slices(prompts)
        errors = prompts.column(ERROR).to_pylist()
        for position, outcome in enumerate(outcomes):
            facts = _add_row(columns, position, outcome, errors[position])
            counters.add_row(
                facts,
                num_input_tokens=lengths[position],
                num_cached_tokens=outcome.result.num_cached_tokens if outcome else None,
                moe=self.moe,
                slice_name=slices[position] if slices else ALL,
            )
        return self._table(prompts, columns, lengths), counters

    def _slices(self, prompts: pa.Table) -> list[str] | None:
        column = self.routing.slice_by
        if column is None or self.routing.level == "off":
            return None
        return [slice_name(value) for value in prompts.column(column).to_pylist()]

    def _table(self, prompts: pa.Table, columns: _Columns, lengths: list[int | None]) -> pa.Table:
        taken = prompts.take(pa.array(columns.take, pa.int64()))
        ours: dict[str, Any] = {
            "input_file": taken.column(FILE),
            "input_row": taken.column(ROW),
            "prompt_repairs": taken.column(REPAIRS),
            "num_input_tokens": [lengths[position] for position in columns.take],
            "routing": self._routing(columns.routing),
        }
        arrays = []
        for schema_field in self.schema:
            name = schema_field.name
            if name in ours:
                values = ours[name]
            elif name in OWN_COLUMNS:
                values = getattr(columns, name)
            else:
                values = taken.column(name)
            arrays.append(_as_type(values, schema_field.type))
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _routing(self, samples: list[ReducedSample | None]) -> pa.Array:
        kind = self.schema.field("routing").type
        if pa.types.is_null(kind) or self.moe is None:
            return pa.nulls(len(samples), kind)
        routings = [sample.routing if sample is not None else None for sample in samples]
        ids = [sample.expert_ids if sample is not None else None for sample in samples]
        return routing_column(routings, ids, kind, self.moe)


def sample_status(sample: ReducedSample) -> str:
    """`truncated` when the token limit ended the sample, else `ok`."""
    return "truncated" if sample.finish_reason == "length" else "ok"


def _add_row(
    columns: _Columns, position: int, outcome: Outcome | None, error: dict[str, Any] | None
) -> list[SampleFacts]:
    if outcome is None:
        error = error or {
            "kind": "internal",
            "message": "neither an outcome nor an error",
            "stage": STAGE,
            "attempts": 0,
        }
        columns.add_failure(position, error)
        return [SampleFacts("failed", error_kind=error["kind"])]
    result = outcome.result
    if result.failure is not None:
        failure = {
            "kind": result.failure.kind,
            "message": result.failure.message[:MAX_ERROR_CHARS],
            "stage": STAGE,
            "attempts": outcome.attempts,
        }
        columns.add_failure(position, failure)
        return [SampleFacts("failed", error_kind=result.failure.kind)]
    for sample in result.samples:
        columns.add_sample(position, sample, result.num_cached_tokens, result.timing)
    return [
        SampleFacts(
            sample_status(sample),
            sample.num_generated_tokens,
            routing=sample.routing,
            routing_invalid=sample.routing_invalid,
        )
        for sample in result.samples
    ]


def _prompt_lengths(prompts: pa.Table) -> list[int | None]:
    import pyarrow.compute as pc

    lengths: list[int | None] = pc.list_value_length(prompts.column(PROMPT_IDS)).to_pylist()
    return lengths


def _as_type(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, list):
        if pa.types.is_dictionary(kind):
            return pa.array(values, pa.string()).dictionary_encode().cast(kind)
        return pa.array(values, kind)
    if pa.types.is_dictionary(kind) and not pa.types.is_dictionary(values.type):
        return values.combine_chunks().dictionary_encode().cast(kind) if hasattr(values, "combine_chunks") else values
    return values if values.type == kind else values.cast(kind)
