"""The row contract: every column's name, type and unit, one pyarrow schema per boundary between stages.

The output schema depends on the settings alone, never on what happened to the rows: good and bad rows share it.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from pipeline.engine import MoeShape
from pipeline.errors import SpecError

SCHEMA_VERSION = 1

# Between stages a row carries the user's columns and these; the prefix keeps them apart from any user column.
PREFIX = "_tm_"
SHARD = "_tm_shard"
FILE = "_tm_file"
ROW = "_tm_row"
READ_ERROR = "_tm_read_error"
PROMPT_IDS = "_tm_prompt_token_ids"
SAMPLING = "_tm_sampling"
REPAIRS = "_tm_repairs"
ERROR = "_tm_error"

MAX_ERROR_CHARS = 500

STATUSES = ("ok", "truncated", "invalid", "failed")

ERROR_TYPE = pa.struct(
    [("kind", pa.string()), ("message", pa.string()), ("stage", pa.string()), ("attempts", pa.int16())]
)
TIMING_TYPE = pa.struct([("queue_s", pa.float32()), ("first_token_s", pa.float32()), ("total_s", pa.float32())])
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def read_fields() -> list[pa.Field]:
    """Columns that reading adds to the user's: identity, and why a row could not be read (null when it could)."""
    return [
        pa.field(SHARD, pa.int32(), nullable=False),
        pa.field(FILE, pa.string(), nullable=False),
        pa.field(ROW, pa.int64(), nullable=False),
        pa.field(READ_ERROR, pa.string()),
    ]


def prompt_fields() -> list[pa.Field]:
    """Columns that templating adds: token ids (null when failed), resolved sampling, repairs, and the failure."""
    return [
        pa.field(PROMPT_IDS, pa.list_(pa.int32())),
        pa.field(SAMPLING, _DICTIONARY),  # nearly all rows of a job share one text, which may hold a JSON schema
        pa.field(REPAIRS, pa.list_(pa.string())),
        pa.field(ERROR, ERROR_TYPE),
    ]


def sampling_texts(prompts: pa.Table) -> list[str | None]:
    """Each row's resolved sampling as JSON; equal ones are one object."""
    column = prompts.column(SAMPLING).unify_dictionaries().combine_chunks()
    texts = column.dictionary.to_pylist()
    return [None if index is None else texts[index] for index in column.indices.to_pylist()]


def routing_type(moe: MoeShape, *, tokens: bool) -> pa.StructType:
    """Type of the `routing` column; counts are row-major [layers x experts].

    With `tokens`, `expert_ids` holds [prompt + generated - 1, layers, top_k] uint8 values, C order; its shape but for
    the first axis is in the field's metadata.
    """
    counts = pa.list_(pa.uint32(), moe.num_layers * moe.num_experts)
    fields = [
        pa.field("prompt_expert_counts", counts),
        pa.field("completion_expert_counts", counts),
        pa.field("repeat_first", pa.float32()),
        pa.field("repeat_any", pa.float32()),
    ]
    if tokens:
        shape = {"dtype": "uint8", "shape": f"[-1,{moe.num_layers},{moe.top_k}]"}
        fields.append(pa.field("expert_ids", pa.binary(), metadata=shape))
    return pa.struct(fields)


def result_fields(routing: pa.DataType | None) -> list[pa.Field]:
    """Our columns of the output, in order. `routing` is null-typed when nothing is captured, but always there."""
    return [
        pa.field("input_file", _DICTIONARY, nullable=False),
        pa.field("input_row", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int16(), nullable=False),
        pa.field("status", _DICTIONARY, nullable=False),
        pa.field("generated_text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("stop_reason", pa.string()),
        pa.field("num_input_tokens", pa.int32()),
        pa.field("num_cached_tokens", pa.int32()),
        pa.field("num_generated_tokens", pa.int32()),
        pa.field("cumulative_logprob", pa.float64()),
        pa.field("prompt_repairs", pa.list_(pa.string())),
        pa.field("error", ERROR_TYPE),
        pa.field("timing", TIMING_TYPE),
        pa.field("routing", routing if routing is not None else pa.null()),
    ]


def output_schema(
    kept: Iterable[pa.Field], routing: pa.DataType | None, *, extra: Iterable[pa.Field] = ()
) -> pa.Schema:
    """Schema of every part: the user's kept columns, then ours, then those of the kind of job.

    Raises:
        SpecError: a kept column has the name of one of ours (as when one run's output is the next one's input).
    """
    kept = list(kept)
    results = [*result_fields(routing), *extra]
    ours = {field.name for field in results}
    taken = [field.name for field in kept if field.name in ours or field.name.startswith(PREFIX)]
    if taken:
        raise SpecError(
            f"input columns {', '.join(taken)} have names that the output uses itself; "
            "if another run wrote them, set `input.prefix`, e.g. to `first_`, to carry them along under other names; "
            "or list the columns to carry in `output.keep`, without these"
        )
    return pa.schema([*kept, *results])
