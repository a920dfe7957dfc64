"""Columns of a synthesis's records, and of what it dropped, after the user's and the samplers'."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from pipeline.errors import SpecError

SOURCE = ("source_file", "source_row", "source_sample")
"""Identity of the sample that a record was."""
RECORD_FIELDS = (
    pa.field(SOURCE[0], pa.string()),
    pa.field(SOURCE[1], pa.int64()),
    pa.field(SOURCE[2], pa.int16()),
    pa.field("record", pa.string()),
    pa.field("num_retries", pa.int16()),
)
SCORE = pa.field("judge_score", pa.int16())
"""Of a synthesis with a judge; null where none was given."""
DROPPED_FIELDS = (pa.field("reason", pa.string()), pa.field("detail", pa.string()), pa.field("like", pa.string()))


def refuse_taken_names(columns: Iterable[str]) -> None:
    """Raise SpecError when a column to carry has the name of one that records have."""
    ours = {field.name for field in (*RECORD_FIELDS, SCORE, *DROPPED_FIELDS)}
    taken = [name for name in columns if name in ours]
    if taken:
        raise SpecError(
            f"columns {', '.join(taken)} have names that records use themselves; "
            "if another run wrote them, set `input.prefix`, e.g. to `first_`, to carry them along under other names; "
            "or list the columns to carry in `output.keep`, without these"
        )
