"""`plan` keeps its word: exact where it says so, within its interval where it samples, and nothing is touched."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.estimate import estimate, estimate_lines, even_sample, total_with_interval
from tests.whole_runs import make_job, run_scripted, write_prompts

ALL_ROWS = 10**9


def texts(count: int, seed: int = 5) -> list[str]:
    rng = random.Random(seed)
    return ["wind " * min(300, int(rng.lognormvariate(2.5, 1.0)) + 1) for _ in range(count)]


@pytest.mark.usefixtures("local_ray")
def test_exact_counts_are_what_the_run_then_reports(tmp_path: Path) -> None:
    rows: list[str | None] = [*texts(150), None, "word " * 600]
    columns = {"text": rows, "own": [*[None] * 100, '{"n": 2, "max_tokens": 3}', *[None] * 51]}
    sections: dict[str, Any] = {"sampling": {"column": "own", "temperature": 1.0}, "limits": {"max_failed_fraction": 1}}
    job = make_job(write_prompts(tmp_path / "in.parquet", 152, **columns), tmp_path / "out", **sections)
    planned = estimate(job, sample_rows=2000)
    summary = run_scripted(job)
    assert planned["exact"]
    assert (planned["rows"], planned["shards"]) == (summary["counts"]["input_rows"], summary["counts"]["shards"])
    assert planned["input_tokens"]["total"] == summary["tokens"]["input"]
    assert planned["rows_that_will_fail"] == summary["error_kinds"] == {"null_prompt": 1, "prompt_too_long": 1}
    assert planned["max_output_tokens"]["total"] == 149 * 6 + 2 * 3
    assert planned["max_output_tokens"]["total"] >= summary["tokens"]["generated"]
    assert planned["fingerprint"] == summary["fingerprint"]
    assert estimate(job, sample_rows=1)["output"]["state"] == "complete"


def test_the_interval_of_a_sample_holds_the_truth(tmp_path: Path) -> None:
    job = make_job(write_prompts(tmp_path / "in.parquet", 4000, text=texts(4000)), tmp_path / "out")
    truth = estimate(job, sample_rows=ALL_ROWS)
    guess = estimate(job, sample_rows=600)
    assert (truth["exact"], guess["exact"]) == (True, False)
    assert 600 <= guess["rows_tokenized"] < 1200
    tokens = guess["input_tokens"]
    assert tokens["low"] <= truth["input_tokens"]["total"] <= tokens["high"]
    assert tokens["low"] < tokens["total"] < tokens["high"]
    assert tokens["high"] - tokens["low"] < 0.4 * tokens["total"]
    line = next(line for line in estimate_lines(guess) if line.startswith("prompts"))
    assert "about" in line
    assert "95% interval" in line


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    rng = random.Random(11)
    population = [int(rng.lognormvariate(4, 0.7)) for _ in range(5000)]
    truth, held = sum(population), 0
    for _ in range(400):
        interval = total_with_interval(rng.sample(population, 300), 0, len(population))
        held += interval["low"] <= truth <= interval["high"]
    assert 0.92 <= held / 400 <= 0.98


def test_rows_that_fail_count_as_rows_without_tokens() -> None:
    assert total_with_interval([10, 10], 2, 4) == {"total": 20, "low": 20, "high": 20}
    assert total_with_interval([], 0, 0) == {"total": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(("allowed", "too_many"), [(0.5, False), (0.1, True)])
def test_more_failures_than_allowed_are_announced(tmp_path: Path, allowed: float, too_many: bool) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 10, text=[None, None, *["wind"] * 8])
    report = estimate(make_job(rows, tmp_path / "out", limits={"max_failed_fraction": allowed}), sample_rows=100)
    assert report["too_many_will_fail"] is too_many
    assert any("limits.max_failed_fraction" in line for line in estimate_lines(report)) is too_many


def test_plan_touches_nothing(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 50)
    before = rows.stat()
    estimate(make_job(rows, tmp_path / "out"), sample_rows=10)
    assert list(tmp_path.iterdir()) == [rows]
    assert rows.stat().st_mtime_ns == before.st_mtime_ns


def test_files_that_no_run_made_are_announced(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 5)
    (tmp_path / "out" / "data").mkdir(parents=True)
    write_prompts(tmp_path / "out" / "data" / "part-1.parquet", 5)
    assert estimate(make_job(rows, tmp_path / "out"), sample_rows=10)["output"]["state"] == "unknown files"


@given(num_items=st.integers(0, 500), wanted=st.integers(1, 500))
def test_a_sample_is_spread_evenly(num_items: int, wanted: int) -> None:
    picked = even_sample(num_items, wanted)
    assert len(picked) == min(num_items, wanted)
    gaps = [after - before for before, after in itertools.pairwise(picked)]
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    assert all(0 <= index < num_items for index in picked)
