from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import jsonl, read
from pipeline.errors import SpecError
from pipeline.read import read_shard
from pipeline.rows import FILE, READ_ERROR, ROW, SHARD
from tests.reading import plan_of, read_all, read_errors

# -- scanning ----------------------------------------------------------------------------------------------------------


def scan_lines(tmp_path, *lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return jsonl.scan(str(path))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (['"a"', "null"], pa.string()),
        (["1", "2"], pa.int64()),
        (["1", "2.5"], pa.float64()),
        (["true"], pa.bool_()),
        (["true", "1"], pa.string()),
        (["1", '"a"', "2.5"], pa.string()),
        (['[{"role": "user"}]'], pa.string()),
        (["9223372036854775808"], pa.string()),
        (["null"], pa.null()),
    ],
)
def test_jsonl_types_are_inferred_over_all_lines(tmp_path, values, expected):
    scan = scan_lines(tmp_path, *[f'{{"x": {value}}}' for value in values])
    assert scan.schema == pa.schema([("x", expected)])


def test_marks_stay_bounded_and_lead_to_the_right_row(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl.Marks, "_CAPACITY", 4)
    path = tmp_path / "a.jsonl"
    path.write_text("".join("\n" * (row % 3 == 0) + f'{{"row": {row}}}\n' for row in range(2000)))
    scan = jsonl.scan(str(path))
    assert len(scan.marks.values) <= 3 * 4
    for start in (0, 1, 63, 64, 65, 1023, 1999):
        lines = list(jsonl.read_lines(str(path), scan.marks.only(start), start, start + 2))
        assert [line.record["row"] for line in lines] == list(range(start, min(start + 2, 2000)))
        assert lines[0].number == start + 1 + start // 3 + 1


def test_too_many_keys_are_refused(tmp_path):
    with pytest.raises(SpecError, match="more than 1000 different keys"):
        scan_lines(tmp_path, *[f'{{"k{i}": 1}}' for i in range(1001)])


# -- reading ----------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "not JSON": (b'{"t": ', "is not JSON"),
    "two objects": (b'{"t": "a"} {"t": "b"}', "is not JSON"),
    "a list": (b"[1]", "is a JSON list, not an object"),
    "a string": (b'"x"', "is a JSON string, not an object"),
    "null": (b"null", "is a JSON null, not an object"),
    "latin-1": (b'{"t": "\xe9"}', "is not UTF-8"),
    "NaN": (b'{"t": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"t": [-Infinity]}', "Infinity is not a JSON number"),
    "beyond double": (b'{"t": 1e999}', "beyond double range"),
    "lone surrogate": (b'{"t": "\\ud800"}', "lone surrogate"),
    "lone surrogate in a key": (b'{"\\uDC00": 1}', "lone surrogate"),
    "raw NUL": (b'{"t": "\x00"}', "is not JSON"),
    "BOM in the middle": (b'\xef\xbb\xbf{"t": "a"}', "is not JSON"),
    "endless nesting": (b'{"t": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "endless integer": (b'{"t": ' + b"9" * 5000 + b"}", "is not JSON"),
    "too long": (b'{"t": "' + b"x" * (8 << 20) + b'"}', "longer than 8 MiB"),
}
GOOD_LINES = {
    "escaped NUL": (b'{"t": "\\u0000"}', "\0"),
    "surrogate pair": (b'{"t": "\\ud83d\\ude00"}', "\N{GRINNING FACE}"),
    "windows line end": (b'{"t": "a"}\r', "a"),
    "spaces around": (b'  {"t": "a"}\t', "a"),
    "duplicate key": (b'{"t": "a", "t": "b"}', "b"),
    "missing key": (b"{}", None),
    "unicode line separator": ('{"t": "a\u2028b"}'.encode(), "a\u2028b"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_a_bad_row_that_names_its_line(tmp_path, name):
    line, message = BAD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(b'{"t": "first"}\n\n' + line + b'\n{"t": "last"}\n')
    table = read_all(tmp_path)
    assert table["t"].to_pylist() == ["first", None, "last"]
    assert table.column_names == ["t", SHARD, FILE, ROW, READ_ERROR]
    assert [bool(error) for error in read_errors(table)] == [False, True, False]
    assert read_errors(table)[1].startswith("line 3 ")
    assert message in read_errors(table)[1]


@pytest.mark.parametrize("name", GOOD_LINES)
def test_odd_line_is_a_good_row(tmp_path, name):
    line, value = GOOD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(b'{"t": "first"}\n' + line + b"\n")
    table = read_all(tmp_path)
    assert (table["t"].to_pylist(), read_errors(table)) == (["first", value], [None, None])


def test_bom_at_the_start_and_a_missing_last_newline_are_legal(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"t": "a"}\n{"t": "b"}')
    assert read_all(tmp_path)["t"].to_pylist() == ["a", "b"]


def test_longest_legal_line_is_read(tmp_path):
    line = b'{"t": "' + b"x" * (jsonl.MAX_LINE_BYTES - 9) + b'"}'
    assert len(line) == jsonl.MAX_LINE_BYTES
    (tmp_path / "a.jsonl").write_bytes(line + b"\r\n" + line[:-2] + b'y"}\n')
    assert [bool(error) for error in read_errors(read_all(tmp_path))] == [False, True]


def test_one_odd_row_leaves_its_neighbours_text_as_it_was(tmp_path):
    lines = ['{"t": "a \\"quoted\\" word"}', '{"t": 5}', '{"t": [{"role": "user"}]}', '{"t": true}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_all(tmp_path)["t"].to_pylist() == ['a "quoted" word', "5", '[{"role": "user"}]', "true"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.one_of(st.just(""), st.just("{broken"), st.integers(0, 9).map(lambda n: json.dumps({"n": n}))), max_size=300
    ),
    size=st.integers(1, 90),
)
def test_jsonl_shards_agree_with_reading_the_file_front_to_back(tmp_path, lines, size):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    rows = [line for line in lines if line]
    plan, schema = plan_of(path, size)
    tables = [read_shard(plan.files[0].slim(shard.start), shard, schema) for shard in plan]
    got = [row for table in tables for row in table.to_pylist()]
    assert [row[ROW] for row in got] == list(range(len(rows)))
    assert [row.get("n") for row in got] == [None if row == "{broken" else json.loads(row)["n"] for row in rows]
    numbers = [i + 1 for i, line in enumerate(lines) if line]
    assert [
        row[READ_ERROR] is None or row[READ_ERROR].startswith(f"line {number} ")
        for row, number in zip(got, numbers, strict=True)
    ] == [True] * len(rows)


def test_shard_of_long_lines_stays_within_its_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_SHARD_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"t": "x" * 391}) for _ in range(5)))
    assert [bool(error) for error in read_errors(read_all(tmp_path))] == [False, False, True, True, True]


def test_jsonl_and_parquet_share_a_run(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t": "a", "n": 1}\n')
    pq.write_table(
        pa.table({"t": pa.array(["b"], pa.large_string()), "n": pa.array([2], pa.int16())}), tmp_path / "b.parquet"
    )
    table = read_all(tmp_path)
    assert (table["t"].to_pylist(), table["n"].to_pylist()) == (["a", "b"], [1, 2])


@pytest.mark.parametrize("spread", ["one file", "two files"])
def test_integers_that_a_double_would_round_stay_as_they_are_beside_a_fraction(tmp_path, spread):
    wide, fraction = '{"id": 9007199254740993}\n', '{"id": 1.5}\n'
    (tmp_path / "a.jsonl").write_text(wide if spread == "two files" else wide + fraction)
    if spread == "two files":
        (tmp_path / "b.jsonl").write_text(fraction)
    assert read_all(tmp_path)["id"].to_pylist() == ["9007199254740993", "1.5"]
