"""A second execution on an output that is there: what it refuses, what it continues, what it does again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.fleet import PoolPlan
from jobs.run import RunOptions, run_job
from pipeline.errors import InfrastructureError, SpecError
from pipeline.lease import acquire_lease
from pipeline.storage import Store
from tests.driver_processes import wait_until
from tests.part_watcher import part_names
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import (
    TINY_MOE,
    check_whole,
    errors,
    make_job,
    read_output,
    results,
    run_scripted,
    write_prompts,
)

pytestmark = pytest.mark.usefixtures("local_ray")

CLEAN = ScriptedConfig(moe=TINY_MOE)


def token_of(word: str) -> int:
    """The id of a word that is a single token."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    ids = MistralTokenizer.v1().instruct_tokenizer.tokenizer.encode(f"a {word}", bos=False, eos=False)
    return int(ids[1])


def part_times(output: Path) -> dict[str, int]:
    return {name: (output / "data" / name).stat().st_mtime_ns for name in part_names(output)}


def num_started(journal: Path) -> int:
    return sum(log.read_text().count("\n") for log in journal.iterdir())


def journaling(folder: Path, name: str) -> ScriptedConfig:
    (folder / name).mkdir()
    return ScriptedConfig(moe=TINY_MOE, journal=str(folder / name))


def incomplete(folder: Path) -> Path:
    """Rows whose run lacks its second part."""
    rows = write_prompts(folder / "in.parquet", 150)
    run_scripted(make_job(rows, folder / "out"))
    (folder / "out" / "data" / part_names(folder / "out")[1]).unlink()
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, local_ray_for_module: None) -> tuple[Path, Path]:
    """Input and output of a run that is done; tests that use it leave both as they are."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_prompts(folder / "in.parquet", 100)
    run_scripted(make_job(rows, folder / "out"))
    return rows, folder / "out"


@pytest.fixture(scope="module")
def local_ray_for_module(_ray_session: None) -> None:
    """The session's Ray, for a fixture that outlives one test."""


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prompt": {"template": "Say {{ text }}"}}, r'prompt\.template: "\{\{ text \}\}" -> "Say \{\{ text \}\}"'),
        ({"sampling": {"temperature": 0.5}}, r"sampling\.temperature: 0\.0 -> 0\.5"),
        ({"model": {"dtype": "bfloat16"}}, r'model\.dtype: "float32" -> "bfloat16"'),
        ({"output": {"keep": "none"}}, r'output\.keep: "all" -> "none"'),
        ({"input": {"limit": 50}}, r"input\.limit: null -> 50"),
    ],
)
def test_a_change_of_what_results_depend_on_is_refused_with_old_and_new(
    finished: tuple[Path, Path], sections: dict[str, Any], message: str
) -> None:
    rows, output = finished
    before = part_times(output)
    path = {"path": str(output)}
    sections = {**sections, "output": {**path, **sections["output"]}} if "output" in sections else sections
    with pytest.raises(SpecError, match=message) as refusal:
        run_scripted(make_job(rows, output, **sections))
    assert refusal.value.exit_code == 2
    assert "choose an empty output.path" in refusal.value.message
    assert part_times(output) == before


def test_a_changed_input_file_is_refused_naming_it(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 80)
    run_scripted(make_job(rows, tmp_path / "out"))
    write_prompts(rows, 81)
    with pytest.raises(SpecError, match=r"input_files\..*in\.parquet: "):
        run_scripted(make_job(rows, tmp_path / "out"))


def test_changed_replicas_limits_and_name_resume_and_finish(tmp_path: Path) -> None:
    rows = incomplete(tmp_path)
    limits = {"limits": {"max_attempts": 5}, "fleet": {"pools": [{"gpu": "cpu", "replicas": 2}]}}
    config = journaling(tmp_path, "journal")
    summary = run_scripted(make_job(rows, tmp_path / "out", **limits), config, replicas=2)
    assert summary["status"] == "done"
    assert num_started(tmp_path / "journal") == 64
    check_whole(tmp_path / "out", 150)


def test_resume_never_wants_an_empty_output_and_always_wants_a_run(tmp_path: Path) -> None:
    rows = incomplete(tmp_path)

    def job(output: str, resume: str) -> Any:
        return make_job(rows, tmp_path / output, output={"path": str(tmp_path / output), "resume": resume})

    with pytest.raises(SpecError, match=r"output\.resume is `never`, but .* holds a run with 2 committed parts"):
        run_scripted(job("out", "never"))
    with pytest.raises(SpecError, match=r"output\.resume is `always`, but .* holds no run"):
        run_scripted(job("new", "always"))
    assert run_scripted(job("out", "always"))["status"] == "done"
    assert run_scripted(job("new", "never"))["status"] == "done"
    assert results(tmp_path / "out") == results(tmp_path / "new")


class FailedRun:
    """200 rows in four parts: rows 3 and 5 failed in the engine, row 70 before it; the others are fine."""

    ENGINE_ROWS = (3, 5)
    BAD_ROW = 70

    def __init__(self, rows: Path, output: Path) -> None:
        self.rows = rows
        self.output = output
        self.job = make_job(rows, output)
        self.times = part_times(output)
        assert {row: kind for row, (kind, _) in errors(output).items()} == {
            3: "request_error",
            5: "request_error",
            70: "empty_prompt",
        }

    def rewritten(self) -> list[int]:
        """Positions of the parts that changed since."""
        now = part_times(self.output)
        assert list(now) == list(self.times)
        return [position for position, name in enumerate(now) if now[name] != self.times[name]]


@pytest.fixture(scope="module")
def failed_original(tmp_path_factory: pytest.TempPathFactory, local_ray_for_module: None) -> FailedRun:
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
    summary = run_scripted(failed_run.job, journaling(tmp_path, "journal"), only_failed=True)
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
    config = journaling(tmp_path, "journal")
    run_job(failed_run.job, RunOptions(quiet=True), say=said.append, pools=[PoolPlan("scripted", 1, config)])
    assert "200 of 200 rows already committed, 2 failed rows will be retried" in said[0]
    assert num_started(tmp_path / "journal") == 2
    assert failed_run.rewritten() == [0]
    assert list(errors(failed_run.output)) == [70]


def test_no_retry_failed_leaves_everything_alone(failed_run: FailedRun, tmp_path: Path) -> None:
    summary = run_scripted(failed_run.job, journaling(tmp_path, "journal"), retry_failed=False)
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
    summary = run_scripted(job, journaling(tmp_path, "journal"), only_failed=True, statuses=("truncated",))
    assert summary["exit_code"] == 0
    assert num_started(tmp_path / "journal") == len(truncated)
    assert results(tmp_path / "out") == before
    assert check_whole(tmp_path / "out", 130) == totals


def test_retry_is_refused_where_rows_are_missing_or_no_run_is(tmp_path: Path) -> None:
    rows = incomplete(tmp_path)
    with pytest.raises(SpecError, match=r"64 of 150 rows have no result yet .* `tramontane run` does the missing"):
        run_scripted(make_job(rows, tmp_path / "out"), only_failed=True)
    with pytest.raises(SpecError, match="holds no run, so there is nothing to retry"):
        run_scripted(make_job(rows, tmp_path / "new"), only_failed=True)
    assert not (tmp_path / "new" / "data").exists()


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
        run_scripted(failed_run.job, journaling(tmp_path, "journal"), only_failed=True)
    assert num_started(tmp_path / "journal") == 0


def test_raised_limit_turns_too_many_failures_into_done(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 100, text=["" if n < 20 else f"question {n}" for n in range(100)])
    strict = run_scripted(make_job(rows, tmp_path / "out", limits={"max_failed_fraction": 0.1}))
    assert (strict["status"], strict["exit_code"]) == ("too_many_failures", 1)
    lenient = {"limits": {"max_failed_fraction": 0.5}}
    run_scripted(make_job(rows, tmp_path / "out", **lenient))
    again = run_scripted(make_job(rows, tmp_path / "out", **lenient))
    assert (again["status"], again["exit_code"], again["counts"]["missing_rows"]) == ("done", 0, 0)


def test_second_run_on_an_output_is_told_who_has_it(finished: tuple[Path, Path]) -> None:
    rows, output = finished
    job = make_job(rows, output)
    owner = rf"in use by run first \(host {socket.gethostname()}, pid {os.getpid()}, since "
    with acquire_lease(Store(str(output)), run_id="first"), pytest.raises(SpecError, match=owner) as refusal:
        run_scripted(job)
    assert refusal.value.exit_code == 2


def test_run_that_loses_its_output_stops_and_says_to_whom(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 2000)
    job = make_job(rows, tmp_path / "out")
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=0.05, moe=TINY_MOE)

    def take_over() -> None:
        wait_until(lambda: len(part_names(tmp_path / "out")) > 1, "two parts")
        store = Store(str(tmp_path / "out"))
        record = json.loads(store.read("_run/lease/000001.json"))
        record |= {"epoch": 2, "token": "other", "run_id": "thief"}
        store.create("_run/lease/000002.json", json.dumps(record).encode())

    thief = threading.Thread(target=take_over)
    thief.start()
    with pytest.raises(InfrastructureError, match="was taken over by run thief"):
        run_scripted(job, config)
    thief.join()
    assert len(part_names(tmp_path / "out")) < job.plan.num_shards
    last = json.loads(max((tmp_path / "out" / "_run" / "events").iterdir()).read_text())
    assert (last["kind"], last["status"], last["exit_code"]) == ("ended", "failed", 3)
