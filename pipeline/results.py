"""Outcomes of one shard -> its output rows and their counters.

Pure: pyarrow and numpy only. Invariant: one input row gives its samples or one failed row, always of the same schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.counters import ALL, RunCounters, SampleFacts, slice_name
from pipeline.engine import MoeShape, Timing
from pipeline.errors import INVALID_JSON
from pipeline.json_schemas import schema_text, violation
from pipeline.labels import LabelRule
from pipeline.multi_labels import MultiLabelRule
from pipeline.outcomes import Outcome
from pipeline.replica_answers import ReducedSample
from pipeline.routing_columns import routing_column
from pipeline.rows import ERROR, FILE, MAX_ERROR_CHARS, PROMPT_IDS, REPAIRS, ROW, sampling_texts
from pipeline.sampling import sampling_from_json
from pipeline.settings import RoutingSettings, SamplingSettings

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
    sample: list[ReducedSample | None] = field(default_factory=list)
    """What generated the row; None for a failed one."""

    def add_failure(self, position: int, error: dict[str, Any]) -> None:
        """Append the single output row of a failed input row."""
        self._add(position, 0, "failed", None, None, None, None, None, None, error, None, None)

    def add_sample(
        self,
        position: int,
        sample: ReducedSample,
        num_cached: int,
        timing: Timing,
        error: dict[str, Any] | None = None,
    ) -> None:
        """Append one sample's output row; with an error it is an invalid one."""
        self._add(
            position,
            sample.index,
            "invalid" if error is not None else sample_status(sample),
            sample.text,
            sample.finish_reason,
            sample.stop_reason,
            num_cached,
            sample.num_generated_tokens,
            sample.cumulative_logprob,
            error,
            {"queue_s": timing.queue_s, "first_token_s": timing.first_token_s, "total_s": timing.total_s},
            sample,
        )

    def _add(self, *values: Any) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            getattr(self, name).append(value)


OWN_COLUMNS = frozenset(_Columns.__slots__) - {"take", "sample"}


@dataclass(frozen=True, slots=True)
class ResultBuilder:
    """Builds the output of shards under one run's settings."""

    schema: pa.Schema
    """Of every part; see `rows.output_schema`."""
    routing: RoutingSettings
    moe: MoeShape | None
    labels: LabelRule | MultiLabelRule | None = None
    """Of a labelling job."""

    def build(self, prompts: pa.Table, outcomes: Sequence[Outcome | None]) -> tuple[pa.Table, RunCounters]:
        """Return the shard's output rows and counters; `outcomes` are in the row order of `prompts`."""
        columns, counters = _Columns(), RunCounters()
        lengths = _prompt_lengths(prompts)
        slices = self._slices(prompts)
        errors = prompts.column(ERROR).to_pylist()
        sampling = sampling_texts(prompts)
        for position, outcome in enumerate(outcomes):
            facts = _add_row(columns, position, outcome, errors[position], sampling[position])
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
            "routing": self._routing(columns.sample),
        }
        if self.labels is not None:
            ours |= _label_columns(self.labels, columns.sample)
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


def _label_columns(rule: LabelRule | MultiLabelRule, samples: Sequence[ReducedSample | None]) -> dict[str, list[Any]]:
    """The label columns, and a generated text that says what they come from, whatever the confidence."""
    logs = [sample.choice_logs if sample is not None else None for sample in samples]
    values = [rule.columns(one) if one is not None else {} for one in logs]
    texts = [rule.text(one) if one is not None else None for one in logs]
    return {field.name: [value.get(field.name) for value in values] for field in rule.fields()} | {
        "generated_text": texts
    }


def sample_status(sample: ReducedSample) -> str:
    """`truncated` when the token limit ended the sample, else `ok`."""
    return "truncated" if sample.finish_reason == "length" else "ok"


def json_error(sample: ReducedSample, sampling: SamplingSettings, attempts: int) -> dict[str, Any] | None:
    """Why a whole sample isn't the JSON that was asked for; None if it is, was cut, or nothing was asked."""
    if not sampling.is_json or sample_status(sample) == "truncated":
        return None
    schema = sampling.json_schema
    broken = violation(sample.text, None if schema is None else schema_text(schema))
    if broken is None:
        return None
    return {"kind": INVALID_JSON, "message": broken, "stage": STAGE, "attempts": attempts}


def _add_row(
    columns: _Columns, position: int, outcome: Outcome | None, error: dict[str, Any] | None, sampling: str | None
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
    settings = sampling_from_json(sampling) if sampling is not None else SamplingSettings()
    return [_add_sample(columns, position, sample, outcome, settings) for sample in result.samples]


def _add_sample(
    columns: _Columns, position: int, sample: ReducedSample, outcome: Outcome, sampling: SamplingSettings
) -> SampleFacts:
    error = json_error(sample, sampling, outcome.attempts)
    columns.add_sample(position, sample, outcome.result.num_cached_tokens, outcome.result.timing, error)
    return SampleFacts(
        columns.status[-1],
        sample.num_generated_tokens,
        error_kind=error["kind"] if error is not None else None,
        routing=sample.routing,
        routing_invalid=sample.routing_invalid,
    )


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
