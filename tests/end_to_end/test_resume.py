"""A second execution on an output that is there: what it refuses, what it continues, whose it is."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InfrastructureError, SpecError
from pipeline.lease import acquire_lease
from pipeline.storage import Store
from tests.driver_processes import wait_until
from tests.part_watcher import part_names
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import (
    TINY_MOE,
    check_whole,
    journaling,
    make_job,
    num_started,
    results,
    run_scripted,
    snapshot,
    unfinished_run,
    write_prompts,
)

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, _ray_session: None) -> tuple[Path, Path]:
    """Input and output of a run that is done; tests that use it leave both as they are."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_prompts(folder / "in.parquet", 100)
    run_scripted(make_job(rows, folder / "out"))
    return rows, folder / "out"


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
    before = snapshot(output)
    path = {"path": str(output)}
    sections = {**sections, "output": {**path, **sections["output"]}} if "output" in sections else sections
    with pytest.raises(SpecError, match=message) as refusal:
        run_scripted(make_job(rows, output, **sections))
    assert refusal.value.exit_code == 2
    assert "choose an empty output.path" in refusal.value.message
    assert snapshot(output) == before


def test_a_changed_input_file_is_refused_naming_it(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 80)
    run_scripted(make_job(rows, tmp_path / "out"))
    write_prompts(rows, 81)
    with pytest.raises(SpecError, match=r"input_files\..*in\.parquet: "):
        run_scripted(make_job(rows, tmp_path / "out"))


@pytest.mark.long
def test_changed_replicas_limits_and_name_resume_and_finish(tmp_path: Path) -> None:
    rows = unfinished_run(tmp_path)
    limits = {"limits": {"max_attempts": 5}, "fleet": {"pools": [{"gpu": "cpu", "replicas": 2}]}}
    summary = run_scripted(make_job(rows, tmp_path / "out", **limits), journaling(tmp_path / "journal"), replicas=2)
    assert summary["status"] == "done"
    assert num_started(tmp_path / "journal") == 64
    check_whole(tmp_path / "out", 150)


@pytest.mark.long
def test_resume_never_wants_an_empty_output_and_always_wants_a_run(tmp_path: Path) -> None:
    rows = unfinished_run(tmp_path)

    def job(output: str, resume: str) -> Any:
        return make_job(rows, tmp_path / output, output={"path": str(tmp_path / output), "resume": resume})

    with pytest.raises(SpecError, match=r"output\.resume is `never`, but .* holds a run with 2 committed parts"):
        run_scripted(job("out", "never"))
    with pytest.raises(SpecError, match=r"output\.resume is `always`, but .* holds no run"):
        run_scripted(job("new", "always"))
    assert run_scripted(job("out", "always"))["status"] == "done"
    assert run_scripted(job("new", "never"))["status"] == "done"
    assert results(tmp_path / "out") == results(tmp_path / "new")


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
