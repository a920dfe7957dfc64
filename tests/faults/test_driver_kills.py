"""Whole runs whose driver, or a replica, is killed with SIGKILL; the same command is given again until it is done."""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.prepare import PreparedJob
from jobs.status import read_status, status_lines
from pipeline.flights import WINDOW_FACTOR
from pipeline.open_rows import OpenRows
from tests.driver_processes import Driver, DriverLauncher, wait_until
from tests.part_watcher import PartWatcher, part_names
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, check_whole, make_job, results, run_scripted, spec_text, write_prompts

NUM_SEQS = 16
SAMPLED = {"sampling": {"temperature": 1.0}}
"""So that a row's seed matters: a resumed run must give it the same."""


class KilledRun:
    """One output, and the drivers that work at it one after another."""

    def __init__(
        self, folder: Path, new_launcher: Callable[..., DriverLauncher], num_rows: int, step_delay_s: float
    ) -> None:
        self.rows = write_prompts(folder / "in.parquet", num_rows)
        self.num_rows = num_rows
        self.output = folder / "out"
        self.spec = folder / "job.yaml"
        self.spec.write_text(spec_text(self.rows, self.output, **SAMPLED))
        self.job: PreparedJob = make_job(self.rows, self.output, **SAMPLED)
        self.journal = folder / "journal"
        self.journal.mkdir()
        self.pids_seen_dead: set[int] = set()
        """Of killed drivers that had become the output's owner."""
        self.committed: dict[str, int] = {}
        """Parts that were there when a driver was killed: when each was written."""
        self.launcher = new_launcher(max_num_seqs=NUM_SEQS, step_delay_s=step_delay_s, journal=str(self.journal))

    def num_started(self) -> int:
        """Rows that engines began, over all processes there ever were."""
        return sum(log.read_text().count("\n") for log in self.journal.iterdir())

    def watcher(self) -> PartWatcher:
        size = self.job.plan.rows_per_shard
        return PartWatcher(self.output, part_rows={size, self.num_rows % size or size})

    def kill_at(self, moment: Callable[[Driver], None]) -> None:
        driver = self.launcher.start(self.spec)
        moment(driver)
        assert not driver.ended, f"it should still be at work, but said:\n{driver.said}"
        self.committed |= self.written_at()
        driver.kill()  # the next driver starts at once: it has to cope with what is left of this one's Ray
        self.check_status(driver.pid)

    def written_at(self) -> dict[str, int]:
        return {name: (self.output / "data" / name).stat().st_mtime_ns for name in part_names(self.output)}

    def check_rework(self, kills: int) -> int:
        """What was committed is never done again; returns how many rows were that were not."""
        written_at = self.written_at()
        assert {name: written_at[name] for name in self.committed} == self.committed
        rework = self.num_started() - self.num_rows
        assert 0 <= rework <= kills * self.open_rows()
        return rework

    def check_status(self, pid: int) -> None:
        """From files alone: a run that had begun work is known to be dead; one killed earlier changed nothing."""
        if not (self.output / "_run" / "progress.json").exists():
            return
        report = read_status(str(self.output))
        last = status_lines(report)[-1]
        assert "ended without a word" in last
        if report["progress"]["run_id"] == report["owner"]["run_id"]:
            assert f"pid {report['owner']['pid']} ended without a word (killed?)" in last
        self.pids_seen_dead |= {report["owner"]["pid"]} & {pid}

    def open_rows(self) -> int:
        """Rows of the shards that are open at one moment: what one kill may cost."""
        return OpenRows.of(WINDOW_FACTOR * NUM_SEQS, self.job.plan.rows_per_shard).at_risk()


@pytest.fixture
def killed_run(tmp_path: Path, new_launcher: Callable[..., DriverLauncher]) -> Callable[[int, float], KilledRun]:
    return functools.partial(KilledRun, tmp_path, new_launcher)


def after_parts(output: Path, count: int) -> Callable[[Driver], None]:
    wanted = len(part_names(output)) + count
    return lambda driver: wait_until(lambda: len(part_names(output)) >= wanted or driver.ended, f"{wanted} parts")


def after_seconds(seconds: float) -> Callable[[Driver], None]:
    """The moment is what is tested, so this one wait is for the clock."""
    return lambda _: threading.Event().wait(seconds) and None


def check_against_undisturbed(run: KilledRun, folder: Path) -> None:
    reference = make_job(run.rows, folder / "undisturbed", **SAMPLED)
    run_scripted(reference, ScriptedConfig(max_num_seqs=NUM_SEQS, moe=TINY_MOE))
    assert results(run.output) == results(folder / "undisturbed")
    assert check_whole(run.output, run.num_rows) == check_whole(folder / "undisturbed", run.num_rows)


@pytest.mark.timeout(600)  # three runs, one after the other: 40 s on an idle machine
def test_killed_driver_resumes_without_lost_or_duplicate_rows(
    local_ray: None, tmp_path: Path, killed_run: Callable[[int, float], KilledRun]
) -> None:
    run = killed_run(500, 0.03)
    with run.watcher() as watcher:
        run.kill_at(after_parts(run.output, 4))
        run.launcher.run(run.spec)
    assert watcher.problems == []
    assert watcher.num_reads >= run.job.plan.num_shards
    assert run.pids_seen_dead
    assert len(run.committed) >= 4
    run.check_rework(kills=1)
    check_against_undisturbed(run, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_driver_killed_at_twenty_random_moments_leaves_the_undisturbed_runs_results(
    local_ray: None, tmp_path: Path, killed_run: Callable[[int, float], KilledRun], record_property: Callable[..., None]
) -> None:
    run = killed_run(10_000, 0.08)
    draw = random.Random(20)
    kills = 20
    with run.watcher() as watcher:
        for _ in range(kills):
            by_clock = draw.random() < 0.4
            moment = after_seconds(draw.uniform(0, 12)) if by_clock else after_parts(run.output, draw.randint(1, 8))
            run.kill_at(moment)
        run.launcher.run(run.spec)
    assert watcher.problems == []
    assert watcher.num_reads >= run.job.plan.num_shards
    assert len(run.pids_seen_dead) >= kills // 3, "too few of them were at work"
    assert len(run.committed) >= run.job.plan.num_shards // 4
    rework = run.check_rework(kills)
    record_property("rows_done_again_per_kill", rework / kills)
    print(f"\n{kills} kills: {rework} rows done again, {rework / kills:.0f} a kill; bound {run.open_rows()}")
    check_against_undisturbed(run, tmp_path)


@pytest.mark.long  # tests/cluster/test_campaign.py kills replicas too
def test_replicas_killed_during_a_run_cost_no_row(local_ray: None, tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 1000)
    (tmp_path / "journal").mkdir()
    config = ScriptedConfig(max_num_seqs=NUM_SEQS, step_delay_s=0.03, moe=TINY_MOE, journal=str(tmp_path / "journal"))
    killed: list[int] = []

    def kill_two() -> None:
        for _ in range(2):
            wait_until(lambda: _at_work(tmp_path / "journal", killed) is not None, "a replica at work")
            victim = _at_work(tmp_path / "journal", killed)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    killer = threading.Thread(target=kill_two)
    killer.start()
    summary = run_scripted(make_job(rows, tmp_path / "out"), config, replicas=2)
    killer.join()
    assert (summary["exit_code"], summary["counts"]["failed"]) == (0, 0)
    assert [loss["kind"] for loss in summary["this_execution"]["replica_losses"]] == ["engine_crash"] * len(killed)
    assert len(killed) == 2
    check_whole(tmp_path / "out", 1000)
    run_scripted(make_job(rows, tmp_path / "undisturbed"))
    assert results(tmp_path / "out") == results(tmp_path / "undisturbed")


def _at_work(journal: Path, killed: list[int]) -> int | None:
    """A replica's process that has begun some rows and is still alive."""
    pids = [int(log.stem) for log in journal.iterdir() if log.read_text().count("\n") > 3 * NUM_SEQS]
    return next((pid for pid in pids if pid not in killed), None)
