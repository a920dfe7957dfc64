"""Processes of Ray Data's own that die in the middle of a run: those of read, template and write tasks, and dispatch's.

The kernel kills such a process when memory runs out. Ray Data's defaults would start it again for ever.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import pipeline.datasource
import pipeline.flow
from pipeline.datasink import PartSink
from pipeline.datasource import MAX_TASK_RETRIES
from pipeline.errors import InfrastructureError
from tests.driver_processes import DriverLauncher, process_below, wait_until
from tests.part_watcher import part_names, part_versions
from tests.whole_runs import check_whole, make_job, run_scripted, spec_text, write_prompts

NUM_ROWS = 320
POISON = f"question number {NUM_ROWS // 2}"


def die_of_poison(table: pa.Table, log: Path) -> None:
    """What the kernel does to a process that needs too much memory for a shard; one line in the log each time."""
    if POISON in table.column("text").to_pylist():
        with log.open("a") as file:
            file.write("died\n")
        os._exit(137)


def poison_read(patch: pytest.MonkeyPatch, log: Path) -> None:
    read = pipeline.datasource._read_block

    def read_and_die(*arguments: Any) -> Any:
        tables = list(read(*arguments))
        for table in tables:
            die_of_poison(table, log)
        return tables

    patch.setattr(pipeline.datasource, "_read_block", read_and_die)


def poison_template(patch: pytest.MonkeyPatch, log: Path) -> None:
    template = pipeline.flow.template_shard

    @functools.wraps(template)
    def template_and_die(table: pa.Table, settings: Any) -> pa.Table:
        die_of_poison(table, log)
        return template(table, settings)

    patch.setattr(pipeline.flow, "template_shard", template_and_die)


def poison_write(patch: pytest.MonkeyPatch, log: Path) -> None:
    class DyingSink(PartSink):
        def _commit(self, table: pa.Table) -> None:
            die_of_poison(table, log)
            super()._commit(table)

    patch.setattr(pipeline.flow, "PartSink", DyingSink)


# Ray Data fuses read and template into one task, so that one of the two says it for both.
@pytest.mark.parametrize(
    "poison", [*(pytest.param(each, marks=pytest.mark.long) for each in (poison_read, poison_template)), poison_write]
)
def test_a_task_whose_process_dies_each_time_ends_the_run_instead_of_starting_again_for_ever(
    local_ray: None, tmp_path: Path, poison: Callable[[pytest.MonkeyPatch, Path], None]
) -> None:
    job = make_job(write_prompts(tmp_path / "in.parquet", NUM_ROWS), tmp_path / "out")
    log = tmp_path / "deaths"
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, log)
        with pytest.raises(InfrastructureError, match=r"shard died 4 times over.* rerun the same command") as ending:
            run_scripted(job)
    assert ending.value.exit_code == 3
    assert log.read_text().count("died") == 1 + MAX_TASK_RETRIES == 4
    assert len(part_names(tmp_path / "out")) < job.plan.num_shards
    assert run_scripted(job)["exit_code"] == 0
    check_whole(tmp_path / "out", NUM_ROWS)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_whose_dispatch_process_is_killed_ends_in_seconds_and_is_continued_by_the_next(
    local_ray: None, tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> None:
    rows, output, spec = write_prompts(tmp_path / "in.parquet", 800), tmp_path / "out", tmp_path / "job.yaml"
    spec.write_text(spec_text(rows, output))
    driver = new_launcher(max_num_seqs=16, step_delay_s=0.05).start(spec)
    driver.until(lambda: len(part_names(output)) >= 3, "three parts")
    dispatch = process_below(driver.pid, "GenerateStage")
    assert dispatch is not None
    dispatch.kill()
    killed_at, committed = time.monotonic(), part_versions(output)
    assert driver.wait() == 3, driver.said
    assert time.monotonic() - killed_at < 60  # 4 s on an idle machine
    last_words = driver.said.splitlines()[-1]
    assert last_words.startswith("error: the dispatch process died")
    assert last_words.endswith("rerun the same command")
    left = part_versions(output)
    assert committed.items() <= left.items()
    assert 3 <= len(left) < make_job(rows, output).plan.num_shards

    assert run_scripted(make_job(rows, output))["exit_code"] == 0
    assert left.items() <= part_versions(output).items()
    check_whole(output, 800)


# The flow's thread stays, waiting, in this process: Ray's end, and with it the process's, may then be a crash.
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_dispatch_process_killed_while_no_shard_is_with_it_ends_the_run_too(local_ray: None, tmp_path: Path) -> None:
    """Ray Data notices the death of an actor by the calls that it had; this one has none."""
    job, go_on = make_job(write_prompts(tmp_path / "in.parquet", NUM_ROWS), tmp_path / "out"), tmp_path / "go-on"
    template = pipeline.flow.template_shard

    @functools.wraps(template)
    def template_late(table: pa.Table, settings: Any) -> pa.Table:
        if POISON in table.column("text").to_pylist():
            wait_until(go_on.exists, "the kill")
        return template(table, settings)

    def kill() -> None:
        wait_until(lambda: len(part_names(tmp_path / "out")) == job.plan.num_shards - 1, "all parts but one")
        time.sleep(1.0)  # two reports: the last of them says that nothing is open
        dispatch = process_below(os.getpid(), "GenerateStage")
        assert dispatch is not None
        dispatch.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.flow, "template_shard", template_late)
        with pytest.raises(InfrastructureError, match=r"the dispatch process died.* rerun the same command"):
            run_scripted(job)
    killer.join()
    go_on.touch()
    assert run_scripted(job)["exit_code"] == 0
    check_whole(tmp_path / "out", NUM_ROWS)
