from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.errors import SpecError
from pipeline.inputs import InputFile
from pipeline.user_schema import user_schema


def having(path, kind, *, name="x", kind_of_file="parquet", num_rows=1):
    return InputFile(path, kind_of_file, 1, "v", num_rows, pa.schema([(name, kind)]))


CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
NAMED_CHAT = pa.list_(pa.struct([("role", pa.string()), ("name", pa.string()), ("content", pa.large_string())]))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.uint32(), pa.uint32()),
        (pa.uint32(), pa.int8(), pa.int64()),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.null(), CHAT, CHAT),
        (pa.dictionary(pa.int32(), pa.string()), pa.string(), pa.string()),
        (pa.list_(pa.int8()), pa.large_list(pa.int16()), pa.large_list(pa.int16())),
        (
            CHAT,
            NAMED_CHAT,
            pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string()), ("name", pa.string())])),
        ),
    ],
)
def test_types_widen_when_no_value_is_lost(left, right, expected):
    files = [having("a", left), having("b", right)]
    assert user_schema(files, required=["x"]).field("x").type == expected


@pytest.mark.parametrize(
    ("left", "right"),
    [(pa.string(), pa.int64()), (pa.int64(), pa.float64()), (pa.uint64(), pa.int64()), (CHAT, pa.string())],
)
def test_types_that_do_not_unify_are_refused_naming_both_files(left, right):
    files = [having("first.parquet", left), having("second.parquet", right)]
    with pytest.raises(SpecError, match=r"first\.parquet.*second\.parquet"):
        user_schema(files, required=[])


def test_missing_required_column_is_refused_for_each_file_with_the_closest_name():
    files = [
        having("a", pa.string(), name="promt"),
        having("b", pa.string(), name="prompt"),
        having("c", pa.null(), name="q"),
    ]
    with pytest.raises(SpecError) as caught:
        user_schema(files, required=["prompt"])
    assert "a has no column 'prompt'" in str(caught.value)
    assert "did you mean 'promt'?" in str(caught.value)
    assert "c has no column 'prompt', which the spec names; its columns are: q" in str(caught.value)
    assert "\nb " not in str(caught.value)


def test_thousands_of_files_alike_give_a_short_message_and_the_first_ones_order():
    files = [having("first", pa.int8(), name="a"), *[having(f"f{i}", pa.int8(), name="b") for i in range(3000)]]
    files.append(having("last", pa.int8(), name="a"))
    assert user_schema(files, required=[]).names == ["a", "b"]
    with pytest.raises(SpecError, match="and 2982 more like these") as caught:
        user_schema(files, required=["c"])
    assert len(str(caught.value).splitlines()) == 21


def test_column_that_only_some_files_have_is_carried():
    files = [having("a", pa.string(), name="x"), having("b", pa.int8(), name="y")]
    assert user_schema(files, required=[]).names == ["x", "y"]


def test_only_what_is_carried_or_required_must_unify():
    files = [having("a", pa.string()), having("b", pa.int64())]
    assert user_schema(files, required=[], carried="none").names == []


def test_carried_column_that_no_file_has_is_refused():
    with pytest.raises(SpecError, match=r"output.keep names column 'xx'.*did you mean 'x'"):
        user_schema([having("a", pa.string())], required=[], carried=["xx"])


def test_internal_names_are_refused():
    with pytest.raises(SpecError, match="_tm_row"):
        user_schema([having("a", pa.string(), name="_tm_row")], required=[])


def test_files_without_rows_have_no_say():
    files = [having("a", pa.string()), having("b", pa.int64(), num_rows=0)]
    assert user_schema(files, required=["x"]).field("x").type == pa.string()


def test_jsonl_files_with_different_guesses_become_text():
    files = [having("a", pa.string(), kind_of_file="jsonl"), having("b", pa.int64(), kind_of_file="jsonl")]
    assert user_schema(files, required=["x"]).field("x").type == pa.string()


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (pa.string_view(), pa.large_string()),
        (pa.binary_view(), pa.large_binary()),
        (pa.list_(pa.string_view()), pa.list_(pa.large_string())),
        (pa.struct([("a", pa.string_view())]), pa.struct([("a", pa.large_string())])),
    ],
)
def test_views_are_read_as_plain_columns(kind, plain):
    assert user_schema([having("a", kind)], required=["x"]).field("x").type == plain
    assert pa.nulls(2, kind).cast(plain).null_count == 2


def test_a_type_that_rows_cannot_be_picked_from_is_refused_before_anything_runs():
    with pytest.raises(SpecError, match=r"column 'x' has type dense_union.*output\.keep"):
        user_schema([having("a", pa.dense_union([pa.field("a", pa.int64())]))], required=[])
