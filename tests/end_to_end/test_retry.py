"""Rows of committed parts done again: by `retry` whatever the reason, by `run` when it may have passed; no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError, SpecError
from tests.part_watcher import part_names, part_versions
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import (
    TINY_MOE,
    check_whole,
    errors,
    journaling,
    make_job,
    num_started,
    read_output,
    results,
    run_scripted,
    snapshot,
    token_of,
    unfinished_run,
    write_prompts,
)

pytestmark = pytest.mark.usefixtures("local_ray")


class FailedRun:
    """200 rows in four parts: rows 3 and 5 failed in the engine, row 70 before it; the others are fine."""

    ENGINE_ROWS = (3, 5)
    BAD_ROW = 70

    def __init__(self, rows: Path, output: Path) -> None:
        self.rows = rows
        self.output = output
        self.job = make_job(rows, output)
        self.versions = part_versions(output)
        assert {row: kind for row, (kind, _) in errors(output).items()} == {
            3: "request_error",
            5: "request_error",
            70: "empty_prompt",
        }

    def rewritten(self) -> list[int]:
        """Positions of the parts that changed since."""
        now = part_versions(self.output)
        assert now.keys() == self.versions.keys()
        return [position for position, name in enumerate(sorted(now)) if now[name] != self.versions[name]]


@pytest.fixture(scope="module")
def failed_original(tmp_path_factory: pytest.TempPathFactory, _ray_session: None) -> FailedRun:
    folder = tmp_path_factory.mktemp("failed")
    text = [f"question number {n}" for n in range(200)]
    for row in FailedRun.ENGINE_ROWS:
        text[row] = f"please explode {row}"
    text[FailedRun.BAD_ROW] = ""
    rows = write_prompts(folder / "in.parquet", 200, text=text)
    config = ScriptedConfig(moe=TINY_MOE, faults={token_of("explode"): "error"})
    run_scripted(make_job(rows, folder / "out"), config)
    run_scripted(make_job(rows, folder / "undisturbed"))
    return FailedRun(rows, folder / "out")


@pytest.fixture
def failed_run(failed_original: FailedRun, tmp_path: Path) -> FailedRun:
    shutil.copytree(failed_original.output, tmp_path / "out")
    return FailedRun(failed_original.rows, tmp_path / "out")


def test_retry_does_only_failed_rows_again_and_rewrites_just_their_parts(failed_run: FailedRun, tmp_path: Path) -> None:
    before = results(failed_run.output)
    summary = run_scripted(failed_run.job, journaling(tmp_path / "journal"), only_failed=True)
    assert (summary["exit_code"], summary["counts"]["failed"]) == (0, 1)
    assert num_started(tmp_path / "journal") == 2
    assert failed_run.rewritten() == [0, 1]
    check_whole(failed_run.output, 200)
    assert errors(failed_run.output) == {70: ("empty_prompt", 0)}
    now = results(failed_run.output)
    assert {identity[1] for identity in now if now[identity] != before[identity]} == {3, 5}
    undisturbed = failed_run.rows.parent / "undisturbed"
    assert now == results(undisturbed)
    assert check_whole(failed_run.output, 200) == check_whole(undisturbed, 200)


def test_run_again_retries_only_kinds_that_may_pass(failed_run: FailedRun, tmp_path: Path) -> None:
    said: list[str] = []
    run_scripted(failed_run.job, journaling(tmp_path / "journal"), said=said)
    assert "200 of 200 rows already committed, 2 failed rows will be retried" in said[0]
    assert num_started(tmp_path / "journal") == 2
    assert failed_run.rewritten() == [0]
    assert list(errors(failed_run.output)) == [70]


def test_no_retry_failed_leaves_everything_alone(failed_run: FailedRun, tmp_path: Path) -> None:
    summary = run_scripted(failed_run.job, journaling(tmp_path / "journal"), retry_failed=False)
    assert summary["counts"]["failed"] == 3
    assert num_started(tmp_path / "journal") == 0
    assert failed_run.rewritten() == []


def test_retry_of_one_kind_leaves_the_others_alone(failed_run: FailedRun, tmp_path: Path) -> None:
    summary = run_scripted(failed_run.job, only_failed=True, kinds=("empty_prompt",))
    assert summary["error_kinds"] == {"empty_prompt": 1, "request_error": 2}
    assert failed_run.rewritten() == [1]
    summary = run_scripted(failed_run.job, only_failed=True, kinds=("request_error",))
    assert summary["error_kinds"] == {"empty_prompt": 1}
    check_whole(failed_run.output, 200)


def test_kinds_with_a_status_that_has_none_are_refused(failed_run: FailedRun) -> None:
    with pytest.raises(SpecError, match="--kind request_error chooses among failed rows, but --status truncated"):
        run_scripted(failed_run.job, only_failed=True, statuses=("failed", "truncated"), kinds=("request_error",))


@pytest.mark.long
def test_retry_of_truncated_rows_takes_all_their_samples_and_keeps_statistics_right(tmp_path: Path) -> None:
    sampling = {"sampling": {"temperature": 1.0, "n": 2, "max_tokens": 6}}
    job = make_job(write_prompts(tmp_path / "in.parquet", 130), tmp_path / "out", **sampling)
    run_scripted(job)
    table = read_output(tmp_path / "out")
    truncated = {
        row
        for row, status in zip(table["input_row"].to_pylist(), table["status"].to_pylist(), strict=True)
        if status == "truncated"
    }
    assert 0 < len(truncated) < 130
    before, totals = results(tmp_path / "out"), check_whole(tmp_path / "out", 130)
    summary = run_scripted(job, journaling(tmp_path / "journal"), only_failed=True, statuses=("truncated",))
    assert summary["exit_code"] == 0
    assert num_started(tmp_path / "journal") == len(truncated)
    assert results(tmp_path / "out") == before
    assert check_whole(tmp_path / "out", 130) == totals


def test_retry_where_rows_are_missing_or_no_run_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    rows = unfinished_run(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(SpecError, match=r"64 of 150 rows have no result yet .* `tramontane run` does the missing"):
        run_scripted(make_job(rows, tmp_path / "out"), only_failed=True)
    for name in ("new", "theirs"):
        with pytest.raises(SpecError, match="holds no run, so there is nothing to retry"):
            run_scripted(make_job(rows, tmp_path / name), only_failed=True)
    assert snapshot(tmp_path) == before


def test_part_whose_statistics_contradict_its_rows_is_refused_before_rows_are_spent_on(
    failed_run: FailedRun, tmp_path: Path
) -> None:
    victim = failed_run.output / "data" / part_names(failed_run.output)[0]
    file = pq.ParquetFile(victim)
    table = file.read()
    changed = table.set_column(
        table.schema.get_field_index("routing"), table.schema.field("routing"), table["routing"].take([9] * len(table))
    )
    with pq.ParquetWriter(victim, changed.schema) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata({k.decode(): v.decode() for k, v in file.metadata.metadata.items()})
    with pytest.raises(InfrastructureError, match=rf"part {victim.name} .*expert selections.*delete the part"):
        run_scripted(failed_run.job, journaling(tmp_path / "journal"), only_failed=True)
    assert num_started(tmp_path / "journal") == 0
