"""Rows with equal prompts and greedy sampling are run once; the output is that of a run that did each by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.fleet import start_fleet, stop_fleet
from cluster.pools import PoolPlan
from pipeline.dispatcher import Dispatcher
from pipeline.engine import Request
from pipeline.outcomes import Outcome
from pipeline.settings import SamplingSettings
from tests.driver_processes import DriverLauncher
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
    spec_text,
    token_of,
    write_prompts,
)

NUM_ROWS, NUM_DISTINCT = 200, 40
PROMPTS = [f"question number {row * 7 % NUM_DISTINCT}" for row in range(NUM_ROWS)]


def test_equal_greedy_rows_are_run_once_and_all_get_the_outcome(local_ray: None, tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", NUM_ROWS, text=PROMPTS)
    said: list[str] = []
    summary = run_scripted(make_job(rows, tmp_path / "out"), journaling(tmp_path / "journal"), said=said)
    assert num_started(tmp_path / "journal") == NUM_DISTINCT
    this = summary["this_execution"]
    assert this["rows_done"] == NUM_ROWS
    assert this["copied"]["rows"] == NUM_ROWS - NUM_DISTINCT
    assert this["input_tokens"] + this["copied"]["input_tokens"] == summary["tokens"]["input"]
    assert this["generated_tokens"] + this["copied"]["generated_tokens"] == summary["tokens"]["generated"]

    alone = make_job(rows, tmp_path / "alone", sampling={"dedupe": "off"})
    assert run_scripted(alone, journaling(tmp_path / "each"))["this_execution"]["copied"]["rows"] == 0
    assert num_started(tmp_path / "each") == NUM_ROWS
    assert results(tmp_path / "out") == results(tmp_path / "alone")
    assert check_whole(tmp_path / "out", NUM_ROWS) == check_whole(tmp_path / "alone", NUM_ROWS)


def test_sampled_rows_are_each_run_and_rows_of_other_sampling_are_no_twins(local_ray: None, tmp_path: Path) -> None:
    overrides = ['{"temperature": 1.0}', '{"max_tokens": 2}', None, None]
    columns = {"text": ["the same"] * 40, "how": overrides * 10}
    rows = write_prompts(tmp_path / "in.parquet", 40, **columns)
    job = make_job(rows, tmp_path / "out", sampling={"column": "how"})
    summary = run_scripted(job, journaling(tmp_path / "journal"))
    assert num_started(tmp_path / "journal") == 10 + 1 + 1
    assert summary["this_execution"]["copied"]["rows"] == 9 + 19


@pytest.mark.long
def test_a_row_that_kills_its_engine_takes_its_twins_with_it_and_nobody_else(local_ray: None, tmp_path: Path) -> None:
    texts = ["this one is poison" if row % 10 == 0 else f"question number {row % 7}" for row in range(100)]
    rows = write_prompts(tmp_path / "in.parquet", 100, text=texts)
    config = ScriptedConfig(moe=TINY_MOE, faults={token_of("poison"): "crash"})
    summary = run_scripted(make_job(rows, tmp_path / "out", limits={"max_failed_fraction": 0.5}), config)
    assert summary["counts"]["failed"] == 10
    assert summary["error_kinds"] == {"engine_crash": 10}
    assert len(summary["this_execution"]["replica_losses"]) <= 3  # as for one such row
    check_whole(tmp_path / "out", 100)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_driver_with_twins_leaves_the_undisturbed_runs_results(
    local_ray: None, tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> None:
    texts = [f"question number {row % 300}" for row in range(2000)]
    rows, output, spec = write_prompts(tmp_path / "in.parquet", 2000, text=texts), tmp_path / "out", tmp_path / "j.yaml"
    spec.write_text(spec_text(rows, output))
    launcher = new_launcher(max_num_seqs=8, step_delay_s=0.1)
    for parts in (3, 9):
        driver = launcher.start(spec)
        driver.until(lambda parts=parts: len(part_names(output)) >= parts, "parts")
        driver.kill()
    launcher.run(spec)
    run_scripted(make_job(rows, tmp_path / "undisturbed"))
    assert results(output) == results(tmp_path / "undisturbed")
    assert check_whole(output, 2000) == check_whole(tmp_path / "undisturbed", 2000)


@pytest.mark.parametrize("action", ["drain", "abandon"])
def test_no_row_waits_for_a_twin_that_was_dropped(local_ray: None, action: str) -> None:
    """Draining drops a shard that isn't begun, with rows that others wait for; abandoning drops them all."""
    sampling = SamplingSettings(temperature=0, max_tokens=8)
    fleet = start_fleet([PoolPlan("pool", 1, ScriptedConfig(max_num_seqs=2, step_delay_s=0.05), max_num_seqs=2)])

    def shard(*numbers: int) -> tuple[list[Request | None], list[bytes | None]]:
        return [Request("", [1, 1000 + n], sampling, None) for n in numbers], [bytes([n]) for n in numbers]

    async def work() -> list[list[Outcome | None] | None]:
        dispatcher = Dispatcher(fleet, max_attempts=3, hang_timeout_s=30, on_outcome=lambda request, outcome: None)
        # The first shard fills the window; the second isn't begun, but the third waits for rows of both.
        shards = [shard(*range(40)), shard(*range(40, 80)), shard(0, 39, 40, 79, 100)]
        tasks = [asyncio.ensure_future(dispatcher.generate(*each)) for each in shards]
        while dispatcher.num_in_flight == 0:  # noqa: ASYNC110  the dispatcher tells nobody
            await asyncio.sleep(0.005)
        dispatcher._shards.note_begun((2, 0))  # as when one of its own rows had gone out
        getattr(dispatcher, action)()
        return await asyncio.gather(*tasks)

    try:
        first, second, third = asyncio.run(asyncio.wait_for(work(), 60))
    finally:
        stop_fleet(fleet)
    assert second is None
    if action == "abandon":
        assert first is third is None
    else:
        assert first is not None
        assert third is not None
        assert [outcome is not None and outcome.copied for outcome in third] == [True, True, False, False, False]
        assert {outcome.result.failure for outcome in (*first, *third) if outcome is not None} == {None}
