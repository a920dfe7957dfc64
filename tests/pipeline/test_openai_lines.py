"""OpenAI batch files as input: lines to columns, line numbers, and ids that occur twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import openai_lines
from pipeline.errors import SpecError
from pipeline.inputs import list_inputs
from pipeline.openai_requests import CHAT, COLUMNS, Refusal, read_request
from pipeline.read import read_shard
from pipeline.rows import READ_ERROR
from pipeline.shards import Plan


def line(custom_id: Any, **others: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"n": 1}, **others})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{each}\n" for each in lines))
    return path


def read(folder: Path, rows_per_shard: int = 3) -> list[dict[str, Any]]:
    """All rows, shard by shard, from copies as small as the ones that travel to workers."""
    plan = Plan(tuple(list_inputs(str(folder), "openai_batch")), rows_per_shard)
    plan = Plan.from_json(plan.to_json())
    rows: list[dict[str, Any]] = []
    for shard in plan:
        file = plan.files[shard.file_index].slim(shard.start, shard.stop)
        assert all(shard.start <= row < shard.stop for row in file.repeated)
        rows += read_shard(file, shard, openai_lines.SCHEMA).to_pylist()
    return rows


def test_lines_are_columns_of_text_with_their_number(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", line("a", body={"é": [1, None]}), "", line("b", extra=1))
    first, second = read(tmp_path)
    assert (first["custom_id"], first["method"], first["url"], first["line"]) == ("a", "POST", CHAT, 1)
    assert json.loads(first["body"]) == {"é": [1, None]}
    assert (second["custom_id"], second["line"], second[READ_ERROR]) == ("b", 3, None)


@pytest.mark.parametrize("value", [5, None, ["a"], {"a": 1}, True, 1.5])
def test_what_is_of_another_type_is_null_and_spoils_no_other_line(value: Any, tmp_path: Path) -> None:
    wrong = json.dumps({"custom_id": value, "method": value, "url": value, "body": value and [value]})
    write(tmp_path / "a.jsonl", line("a"), wrong, line("b"))
    rows = read(tmp_path)
    assert [rows[1][name] for name in ("custom_id", "method", "url", "body")] == [None] * 4
    assert [row["custom_id"] for row in rows] == ["a", None, "b"]
    assert [row[READ_ERROR] for row in rows] == [None] * 3


def test_a_line_that_is_no_object_keeps_its_number(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", line("a"), "{", "7", line("b"))
    rows = read(tmp_path)
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row[READ_ERROR] and row[READ_ERROR][:13] for row in rows] == [None, "line 2 is not", "line 3 is a J", None]


def test_of_equal_ids_the_first_stands_whatever_file_or_shard_the_others_are_in(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *[line(f"id-{n}") for n in range(10)], line("id-3"), line(None), line(None))
    write(tmp_path / "b.jsonl", line("new"), "{", line("id-9"), line("id-3"), line("new"))
    rows = read(tmp_path)
    bad = [(row["custom_id"], row["line"]) for row in rows if "of an earlier line" in (row[READ_ERROR] or "")]
    assert bad == [("id-3", 11), ("id-9", 3), ("id-3", 4), ("new", 5)]


def test_files_without_repeated_ids_cost_the_plan_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", line("a"), line("b"))
    plan = Plan(tuple(list_inputs(str(tmp_path), "openai_batch")), 64)
    assert '"repeated":' not in plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan


def test_an_empty_file_has_no_requests(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    assert read(tmp_path) == []


def test_parquet_is_no_batch_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(SpecError, match=r"OpenAI batch files are JSONL; leave input\.format out"):
        list_inputs(str(tmp_path), "openai_batch")


@pytest.mark.parametrize(("name", "message"), [("MAX_REPEATED", "give every request an id"), ("MAX_REQUESTS", "split")])
def test_what_the_driver_holds_is_bounded(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", *[line("a")] * 6)
    write(tmp_path / "b.jsonl", *[line("a")] * 6)
    monkeypatch.setattr(openai_lines, name, 10)
    with pytest.raises(SpecError, match=message):
        list_inputs(str(tmp_path), "openai_batch")


def test_a_deeply_nested_line_is_a_bad_row_wherever_the_limit_lies(tmp_path: Path) -> None:
    """Python's limit counts frames, so what can be read at one depth of calls can't be written at another."""
    depths = [*range(850, 1000), 3000]
    deep = [f'{{"n": {"[" * depth + "]" * depth}}}' for depth in depths]
    write(tmp_path / "a.jsonl", *[line(str(len(body))).replace('{"n": 1}', body) for body in deep])
    rows = read(tmp_path, rows_per_shard=64)
    errors = [row[READ_ERROR] for row in rows]
    assert len(rows) == len(depths)
    assert (errors[0], errors[-1]) == (None, f"line {len(depths)} is nested too deeply")
    assert all(row["custom_id"] is None for row in rows if row[READ_ERROR] is not None)
    for row in rows:
        refusal = read_request(*(row[name] for name in COLUMNS))
        assert isinstance(refusal, Refusal) or row[READ_ERROR] is None
