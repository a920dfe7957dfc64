"""Incremental jobs, whole: night after night each new row is done once, whatever happens in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.status import output_of
from pipeline.errors import SpecError
from tests.driver_processes import DriverLauncher, wait_until
from tests.incremental_jobs import Nightly, claims, ids, write_rows
from tests.part_watcher import part_names
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, check_whole, journaling, num_started, results, snapshot, token_of

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.long
def test_seven_nights_with_one_missed_repeated_and_killed_and_late_rows_do_every_row_once(
    tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> None:
    choices = ["billing", "bug", "praise"]
    job = Nightly(tmp_path / "in" / "**" / "*.parquet", tmp_path / "out", choices=choices, id="id", new_by="id")

    def arrive(night: int, numbers: range) -> None:
        write_rows(tmp_path / "in" / f"day={night}" / "rows.parquet", numbers)

    def done(night: dict[str, list[dict[str, object]]]) -> list[tuple[object, ...]]:
        return [(run["run"], run["resumed"], run["summary"]["counts"]["committed_rows"]) for run in night["runs"]]  # type: ignore[index]

    arrive(1, range(100))
    assert done(job.run()) == [(1, False, 100)]
    arrive(2, range(100, 250))
    assert done(job.run()) == [(2, False, 150)]
    arrive(3, range(250, 300))  # nobody runs the job
    arrive(4, range(300, 420))
    assert done(job.run()) == [(3, False, 170)]
    before = snapshot(tmp_path / "out")
    assert done(job.run()) == []  # night 5: nothing came, and the job runs twice
    assert done(job.run()) == []
    assert snapshot(tmp_path / "out") == before
    arrive(6, range(420, 1220))
    write_rows(tmp_path / "in" / "day=2" / "late.parquet", range(230, 290))  # all known
    write_rows(tmp_path / "in" / "day=1" / "late.parquet", range(1220, 1240))
    spec = tmp_path / "job.yaml"
    spec.write_text(job.spec_text())
    driver = new_launcher(max_num_seqs=8, step_delay_s=0.05).start(spec, "--ray", "local")
    killed = tmp_path / "out" / "runs"
    wait_until(lambda: any(len(part_names(run)) > 2 for run in killed.glob("000004-*")), "three parts of the night")
    driver.kill()
    (folder,) = killed.glob("000004-*")
    assert 2 < len(part_names(folder)) < 13
    write_rows(tmp_path / "in" / "day=6" / "later.parquet", range(1230, 1300))  # 10 are claimed
    (tmp_path / "journal").mkdir()
    assert done(job.run()) == [(4, True, 820), (5, False, 60)]
    arrive(7, range(1300, 1310))
    assert done(job.run()) == [(6, False, 10)]
    assert job.times_done() == dict.fromkeys(ids(range(1310)), 1)
    assert all(row["label"] in choices for row in job.rows())
    for run in killed.iterdir():
        check_whole(run, json.loads((run / "summary.json").read_text())["counts"]["input_rows"])
    assert claims(tmp_path / "out") == [f"{number:06d}.json" for number in range(1, 7)]


def test_a_night_cut_short_is_finished_before_new_rows_are_claimed_and_a_repeated_one_writes_nothing(
    tmp_path: Path,
) -> None:
    job = Nightly(tmp_path / "in", tmp_path / "out", id="id", new_by="id")
    write_rows(tmp_path / "in" / "a.parquet", range(150))
    (first,) = job.run()["runs"]
    night = tmp_path / "out" / first["folder"]
    whole = results(night)
    sorted((night / "data").iterdir())[1].unlink()
    (night / "summary.json").unlink()
    write_rows(tmp_path / "in" / "0.parquet", range(140, 180))
    second = job.run(journaling(tmp_path / "journal"))
    assert [(run["run"], run["resumed"]) for run in second["runs"]] == [(1, True), (2, False)]
    assert results(night) == whole
    assert num_started(tmp_path / "journal") == 64 + 30
    check_whole(tmp_path / "out" / second["runs"][1]["folder"], 30)
    assert job.times_done() == dict.fromkeys(ids(range(180)), 1)
    before = snapshot(tmp_path / "out")
    assert job.run() == {"output": str(tmp_path / "out"), "runs": [], "exit_code": 0}
    assert job.said[-1] == f"nothing new: 2 runs in {tmp_path / 'out'} have all of 2 files"
    assert snapshot(tmp_path / "out") == before
    assert output_of(str(tmp_path / "out")) == str(tmp_path / "out" / second["runs"][1]["folder"])


@pytest.mark.long
def test_retry_does_failed_rows_of_every_night_again_and_refuses_a_file_that_changed(tmp_path: Path) -> None:
    job = Nightly(tmp_path / "in", tmp_path / "out", id="id", new_by="id")
    failing = ScriptedConfig(moe=TINY_MOE, faults={token_of("bad"): "error"})
    lenient = {"limits": {"max_failed_fraction": 1.0}}
    for night in range(2):
        write_rows(tmp_path / "in" / f"{night}.parquet", range(20 * night, 20 * night + 3), text="bad")
        write_rows(tmp_path / "in" / f"{night}-good.parquet", range(20 * night + 3, 20 * night + 9))
        (run,) = job.run(failing, **lenient)["runs"]
        assert run["summary"]["counts"]["failed"] == 3
    assert job.run()["runs"] == []  # failed rows aren't new
    report = job.run(None, retry=True)
    assert [(run["run"], run["summary"]["counts"]["failed"]) for run in report["runs"]] == [(1, 0), (2, 0)]
    assert job.run(None, retry=True)["runs"] == []
    assert job.said[-1] == f"nothing to retry in the 2 runs of {tmp_path / 'out'}"
    assert job.times_done() == dict.fromkeys(ids([*range(9), *range(20, 29)]), 1)
    write_rows(tmp_path / "in" / "3.parquet", range(40, 42), text="bad")
    job.run(failing, **lenient)
    write_rows(tmp_path / "in" / "3.parquet", range(40, 43), text="bad")
    with pytest.raises(
        SpecError, match=r"run 3 \(runs/.*\) in .* has failed rows of .*3\.parquet, which isn't the file"
    ):
        job.run(None, retry=True)
