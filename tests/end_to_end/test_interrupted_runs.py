"""Whole runs in processes of their own that get SIGINT or SIGTERM: at work, twice, and while engines still load."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.status import read_status
from tests.driver_processes import Driver, DriverLauncher, wait_until
from tests.part_watcher import part_names
from tests.whole_runs import check_whole, make_job, run_scripted, spec_text, write_prompts


class Interrupted:
    """A slow run in a process of its own, to be interrupted."""

    NUM_ROWS = 1500

    def __init__(self, folder: Path, launcher: DriverLauncher) -> None:
        self.rows = write_prompts(folder / "in.parquet", self.NUM_ROWS)
        self.output = folder / "out"
        self.spec = folder / "job.yaml"
        self.spec.write_text(spec_text(self.rows, self.output))
        self.launcher = launcher

    def at_work(self) -> Driver:
        driver = self.launcher.start(self.spec)
        progress = self.output / "_run" / "progress.json"
        driver.until(lambda: progress.exists() and in_flight(progress) > 0, "rows in flight")
        return driver


def in_flight(progress: Path) -> int:
    return int(json.loads(progress.read_text())["rows_in_flight"])


@pytest.fixture
def interrupted(
    request: pytest.FixtureRequest, tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> Interrupted:
    engines = {"max_num_seqs": 16, "step_delay_s": 0.05, **getattr(request, "param", {})}
    return Interrupted(tmp_path, new_launcher(**engines))


@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        (signal.SIGINT, True),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.long),
    ],
)
def test_interrupted_run_commits_what_is_in_flight_says_how_to_go_on_and_does(
    local_ray: None, interrupted: Interrupted, number: int, to_group: bool
) -> None:
    driver = interrupted.at_work()
    (driver.signal_group if to_group else driver.signal_alone)(number)
    assert driver.wait() == 130
    assert "interrupted" in driver.said
    assert f"next: tramontane run {interrupted.spec}   (continues where this one stopped)" in driver.said
    assert "Traceback" not in driver.said
    committed = len(part_names(interrupted.output))
    assert 0 < committed < 23
    report = read_status(str(interrupted.output))
    assert (report["progress"]["state"], report["summary"]["status"]) == ("ended", "interrupted")
    assert report["summary"]["counts"]["committed_rows"] == committed * 64
    summary = run_scripted(make_job(interrupted.rows, interrupted.output))
    assert summary["status"] == "done"
    check_whole(interrupted.output, Interrupted.NUM_ROWS)


@pytest.mark.long
@pytest.mark.parametrize("interrupted", [{"step_delay_s": 30.0}], indirect=True)
def test_second_interrupt_ends_at_once(interrupted: Interrupted) -> None:
    driver = interrupted.at_work()
    driver.signal_group(signal.SIGINT)
    progress = interrupted.output / "_run" / "progress.json"
    wait_until(lambda: json.loads(progress.read_text())["state"] == "draining", "the first is heard")
    driver.signal_group(signal.SIGINT)
    wait_until(lambda: driver.ended, "it ends long before its engine's next step", deadline_s=15)
    assert driver.wait() == 130
    assert part_names(interrupted.output) == []


@pytest.mark.long
@pytest.mark.parametrize("interrupted", [{"start_delay_s": 600.0}], indirect=True)
def test_interrupt_while_engines_still_load_ends_the_run_soon(interrupted: Interrupted) -> None:
    driver = interrupted.launcher.start(interrupted.spec)
    progress = interrupted.output / "_run" / "progress.json"
    driver.until(progress.exists, "the run is being watched")
    assert json.loads(progress.read_text())["state"] == "starting"
    driver.signal_group(signal.SIGINT)
    assert driver.wait() == 130
    assert part_names(interrupted.output) == []
