"""One schema for the user's columns of a whole run, made from the schemas of all its files.

Pure. Knows types and names, not files' contents. Invariant: every column of every file casts to the run's type without
loss, so reading can't fail on a value.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import pyarrow as pa

from pipeline.errors import SpecError
from pipeline.rows import PREFIX

_MAX_SHOWN = 20
WIDE_INTEGERS = {b"tramontane.wide_integers": b"1"}
"""Metadata of a guessed field that holds integers which a double would round: those beyond 2**53."""


class HasSchema(Protocol):
    """What is needed of an input file."""

    @property
    def path(self) -> str:
        """Identity, for messages."""
        ...

    @property
    def format(self) -> str:
        """`parquet` or `jsonl`."""
        ...

    @property
    def num_rows(self) -> int:
        """Files without rows have no say."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """The file's own columns."""
        ...


def user_schema(
    files: Sequence[HasSchema], *, required: Iterable[str], carried: Literal["all", "none"] | Sequence[str] = "all"
) -> pa.Schema:
    """Return the schema of the columns to read: `required` ones and those carried to the output, in the files' order.

    A carried column that some file lacks is null there. Types that differ between Parquet files widen when no value is
    lost (int32 and int64, string and large_string, null and anything, struct fields by name). JSONL declares no types:
    int and float widen to double unless an int is beyond 2**53, any other mix becomes a string (see `jsonl`).

    Raises:
        SpecError: a required column is missing from a file, a carried one from all of them, or types don't unify. All
            problems at once.
    """
    required = list(dict.fromkeys(required))
    everyone = [file for file in files if file.num_rows and len(file.schema)]
    # The first file of each schema speaks for the others like it.
    distinct: dict[tuple[str, pa.Schema, tuple[str, ...]], HasSchema] = {}
    for file in everyone:
        wide = tuple(name for name in file.schema.names if _holds_wide(file.schema, name))  # `==` ignores metadata
        distinct.setdefault((file.format, file.schema, wide), file)
    voters = list(distinct.values())
    present = {name for file in voters for name in file.schema.names}
    problems = (
        _all_missing(everyone, required) if any(set(required) - set(file.schema.names) for file in voters) else []
    )
    if voters and not isinstance(carried, str):
        everything = pa.schema([(name, pa.null()) for name in sorted(present)])
        problems += [_absent(name, everything) for name in carried if name not in present]
    wanted = _wanted(voters, required, carried)
    fields: list[pa.Field] = []
    for name in wanted:
        try:
            fields.append(pa.field(name, _usable(name, _column_type(name, voters))))
        except SpecError as error:
            problems.append(error.message)
    problems += [
        f"column {name!r} has the prefix {PREFIX} that is kept for internal columns; rename it"
        for name in wanted
        if name.startswith(PREFIX)
    ]
    if problems:
        raise SpecError("\n".join(dict.fromkeys(problems)))
    return pa.schema(fields)


def _wanted(voters: Sequence[HasSchema], required: list[str], carried: str | Sequence[str]) -> list[str]:
    in_order = dict.fromkeys(name for file in voters for name in file.schema.names)
    if carried == "all":
        chosen = list(in_order)
    else:
        names = set(required) | (set() if isinstance(carried, str) else set(carried))
        chosen = [name for name in in_order if name in names]
    return chosen + [name for name in required if name not in in_order]  # no file with rows: null columns


def _all_missing(files: Sequence[HasSchema], required: Sequence[str]) -> list[str]:
    lacking = [(file, name) for file in files for name in required if name not in file.schema.names]
    shown = [_missing(file, name) for file, name in lacking[:_MAX_SHOWN]]
    return shown + ([f"... and {len(lacking) - _MAX_SHOWN} more like these"] if len(lacking) > _MAX_SHOWN else [])


def _missing(file: HasSchema, name: str) -> str:
    return f"{file.path} has no column {name!r}, which the spec names; {_suggestion(name, file.schema.names)}"


def _absent(name: str, schema: pa.Schema) -> str:
    return f"output.keep names column {name!r}, which no input file has; {_suggestion(name, schema.names)}"


def _suggestion(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"its columns are: {shown}"


def _column_type(name: str, voters: Sequence[HasSchema]) -> pa.DataType:
    """Unify one column over all files; JSONL files first among themselves, as their types are guesses."""
    having = [(file, plain_type(file.schema.field(name).type)) for file in voters if name in file.schema.names]
    if not having:
        return pa.string()
    guessed = [kind for file, kind in having if file.format == "jsonl"]
    merged = functools.reduce(merge_guesses, guessed, pa.null())
    if pa.types.is_floating(merged) and any(_holds_wide(file.schema, name) for file in voters):
        merged = pa.string()
    owner, result = having[0][0], pa.null()
    for file, kind in having:
        kind = merged if file.format == "jsonl" else kind
        wider = widen(result, kind)
        if wider is None:
            raise SpecError(
                f"column {name!r} is {result} in {owner.path} but {kind} in {file.path}; "
                "give it one type in all files, or drop it with `output.keep` if the prompt doesn't need it"
            )
        if wider != result:
            owner, result = file, wider
    return result


def _usable(name: str, kind: pa.DataType) -> pa.DataType:
    """Return the type if a run can pick rows from a column of it, as it must when all is generated and paid for."""
    try:
        pa.schema([(name, kind)]).empty_table().take(pa.array([], pa.int64()))
    except pa.ArrowNotImplementedError as error:
        raise SpecError(
            f"column {name!r} has type {kind}, from which rows can't be picked; cast it in the input, or leave it out "
            "with `output.keep`"
        ) from error
    return kind


def _holds_wide(schema: pa.Schema, name: str) -> bool:
    return name in schema.names and schema.field(name).metadata == WIDE_INTEGERS


def merge_guesses(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    """Unify two types inferred from JSON: never fails, since text can hold everything."""
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    if {left, right} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return pa.string()


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type with all nested fields nullable, without metadata and views, so that equal things are equal."""
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind.fields])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    # Views are an optimisation of memory layout that Parquet doesn't know, and that rows can't be taken from.
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def widen(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Return the narrowest type that holds every value of both, or None."""
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    if pa.types.is_dictionary(left) or pa.types.is_dictionary(right):
        return widen(_values(left), _values(right))
    for widen_kind in (_widen_integers, _widen_floats, _widen_text, _widen_lists, _widen_structs):
        wider = widen_kind(left, right)
        if wider is not None:
            return wider
    return None


def _values(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _widen_integers(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_integer(left) and pa.types.is_integer(right)):
        return None
    signed, unsigned = pa.types.is_signed_integer, pa.types.is_unsigned_integer
    if signed(left) == signed(right):
        return left if left.bit_width >= right.bit_width else right
    needed = max(kind.bit_width * (2 if unsigned(kind) else 1) for kind in (left, right))
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(needed)  # uint64 with a signed type fits nothing


def _widen_floats(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_floating(left) and pa.types.is_floating(right)):
        return None  # int64 with double isn't lossless: ids beyond 2^53 would change
    return left if left.bit_width >= right.bit_width else right


def _widen_text(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if {left, right} <= {pa.string(), pa.large_string(), pa.string_view()}:
        return pa.large_string()
    if {left, right} <= {pa.binary(), pa.large_binary(), pa.binary_view()}:
        return pa.large_binary()
    return None


def _widen_lists(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    def is_list(kind: pa.DataType) -> bool:
        return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))

    if not (is_list(left) and is_list(right)):
        return None
    item = widen(left.value_type, right.value_type)
    if item is None:
        return None
    large = pa.types.is_large_list(left) or pa.types.is_large_list(right)
    return pa.large_list(item) if large else pa.list_(item)


def _widen_structs(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_struct(left) and pa.types.is_struct(right)):
        return None
    fields = {field.name: field.type for field in left.fields}
    for field in right.fields:
        wider = widen(fields.get(field.name, pa.null()), field.type)
        if wider is None:
            return None
        fields[field.name] = wider
    return pa.struct(list(fields.items()))
