"""The measuring stick itself: rows that are the same for everybody, figures that are what they are called."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.bench.compare import parse, rounds, run_one, sizes_of
from tests.bench.compared import as_markdown, medians
from tests.bench.contestants import NAMES, Bench, command
from tests.bench.workloads import NAMES as WORKLOADS
from tests.bench.workloads import num_documents, rows_of, write_rows


def run(who: str, size: str, *, rows: int, wall: float, tokens: int = 0, cpu: float = 0.0, engine: float = 0.0) -> dict:
    return {
        "model": "m",
        "workload": "w",
        "who": who,
        "size": size,
        "rows": rows,
        "wall_s": wall,
        "tokens": tokens,
        "cpu_s": cpu,
        "engine_cpu_s": engine,
        "first_row_s": wall / 2,
        "most_rows_s": wall * 0.9,
        "peak_mib": 100.0,
    }


def test_steady_rates_and_costs_leave_start_up_out_and_a_slow_repetition_changes_nothing() -> None:
    runs = []
    for who, start, rate in (("bare", 10.0, 100.0), ("ours", 30.0, 80.0)):
        for slower in (1.0, 1.0, 9.0):
            for size, rows in {"start": 1, "short": 10, "long": 110}.items():
                wall = slower * (start + 10 * rows / rate)
                runs.append(run(who, size, rows=rows, wall=wall, tokens=10 * rows, cpu=start + rows, engine=rows / 2))
    found = medians(runs)
    assert found["m", "w", "bare"]["steady_tokens_per_s"] == pytest.approx(100)
    assert found["m", "w", "ours"]["steady_to_bare"] == pytest.approx(0.8)
    assert found["m", "w", "ours"]["after_start_s"] == pytest.approx(10 * 109 / 80)
    assert found["m", "w", "ours"]["cpu_ms_per_row"] == pytest.approx(1000)
    assert found["m", "w", "ours"]["outside_ms_per_row"] == pytest.approx(500)
    table = as_markdown({"hardware": "h", "versions": {}, "commit": "c", "date": "d", "command": "x"}, found)
    assert "| ours | 80.00 | 0.80 |" in table


def test_contestants_take_turns_within_every_repetition() -> None:
    options = argparse.Namespace(models=["tiny"], workloads=["short"], contestants=list(NAMES), rows=70, repeats=2)
    made = list(rounds(options))
    assert [what["who"] for what in made[: len(NAMES)]] == list(NAMES)
    assert len(made) == 2 * 3 * len(NAMES)
    assert sizes_of(70) == {"start": 1, "short": 10, "long": 70}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_every_time_and_fits_the_models_length(name: str) -> None:
    rows = rows_of(name, 300)
    assert rows == rows_of(name, 300)
    assert rows != rows_of(name, 300, seed=2)
    assert max(len(row.text.split()) + row.max_tokens for row in rows) < 1024


def test_shared_prefixes_are_asked_eight_times_each_in_no_order() -> None:
    rows = rows_of("prefixes", 400)
    documents = [row.text.split("\n")[0] for row in rows]
    assert num_documents(400) == len(set(documents)) == 50
    assert {documents.count(document) for document in set(documents)} == {8}
    assert documents != documents[:50] * 8


def test_every_form_of_the_rows_says_the_same(tmp_path: Path) -> None:
    rows = rows_of("natural", 5)
    file = write_rows(rows, tmp_path / "rows.parquet", lambda text: [1, len(text)])
    table = pq.read_table(file).to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row, line, source in zip(table, lines, rows, strict=True):
        assert row["messages"] == line["body"]["messages"] == [{"role": "user", "content": source.text}]
        assert json.loads(row["sampling"])["max_tokens"] == line["body"]["max_tokens"] == row["max_tokens"]


def test_an_unknown_contestant_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no contestant 'theirs'; there are bare, ours"):
        command("theirs", Bench(tmp_path, {}, 1), tmp_path / "rows.parquet", tmp_path / "work")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("who", NAMES)
def test_each_contestant_answers_all_rows_and_is_measured(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", "--models", "tiny", "--rows", "14", "--folder", str(tmp_path)])
    options = parse()
    (tmp_path / "logs").mkdir()
    found = run_one({"model": "tiny", "workload": "natural", "repeat": 0, "size": "long", "who": who}, options)
    expected = sum(row.max_tokens for row in rows_of("natural", 14))
    assert found["rows"] == 14
    assert 0 < found["tokens"] <= expected
    assert 0 < found["first_row_s"] <= found["most_rows_s"] <= found["wall_s"]
    assert found["cpu_s"] > 1
    assert found["peak_mib"] > 100
    assert (found["engine_cpu_s"] > 0) == (who != "bare")  # whose engine is in the process that is measured
