"""Another run's output as input: the columns that it added are read under a prefix, so that this run can add its own.

Pure. Invariant: no name is both a column of the file and another column's name under the prefix, so that a name says
which column is meant without a look at the file.
"""

from __future__ import annotations

from functools import cache

import pyarrow as pa

from pipeline.labels import CONFIDENCE, LABEL, PROBABILITIES
from pipeline.multi_labels import LABELS
from pipeline.record_fields import DROPPED_FIELDS, RECORD_FIELDS, SCORE
from pipeline.rows import result_fields


@cache
def added_names() -> frozenset[str]:
    """Names of all columns that a run of any kind adds to its rows."""
    fields = (*result_fields(None), *RECORD_FIELDS, SCORE, *DROPPED_FIELDS)
    return frozenset((*(field.name for field in fields), LABEL, LABELS, CONFIDENCE, PROBABILITIES))


def own_name(name: str, prefix: str) -> str:
    """What the file calls the column that the run knows by this name."""
    bare = name.removeprefix(prefix)
    return bare if bare in added_names() else name


def prefixed(schema: pa.Schema, prefix: str) -> pa.Schema:
    """A file's columns as the run knows them.

    Raises:
        ValueError: a column has the name of another one under the prefix.
    """
    if not prefix:
        return schema
    taken = [name for name in schema.names if own_name(name, prefix) != name]
    if taken:
        raise ValueError(f"columns {', '.join(taken)} begin with input.prefix {prefix!r} already; choose another one")
    names = [f"{prefix}{name}" if name in added_names() else name for name in schema.names]
    return pa.schema([field.with_name(name) for field, name in zip(schema, names, strict=True)])
