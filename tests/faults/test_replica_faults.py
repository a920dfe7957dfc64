"""Dispatcher, fleet and replicas as real Ray actors, with engines that crash, hang and refuse."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.fleet import start_fleet
from cluster.pools import PoolPlan
from pipeline.dispatcher import Dispatcher
from pipeline.engine import Request
from pipeline.errors import InfrastructureError
from pipeline.outcomes import Outcome
from pipeline.settings import SamplingSettings
from tests.scripted_engine import ScriptedConfig, complete

SAMPLING = SamplingSettings(temperature=0, max_tokens=8)


def requests_for(rows: range, timeout_s: float = 60.0) -> list[Request | None]:
    return [Request("", [1, 1000 + row], SAMPLING, None, timeout_s=timeout_s) for row in rows]


def expected_text(row: int) -> str:
    return complete(Request("", [1, 1000 + row], SAMPLING, None), ScriptedConfig()).samples[0].text


class Run:
    """One fleet and one dispatcher, as a run has them."""

    def __init__(self, config: ScriptedConfig, replicas: int, **limits: Any) -> None:
        pools = [PoolPlan("pool", replicas, config)]
        self.fleet = start_fleet(pools, backoff_s=0.1)
        self.limits = {"max_attempts": 3, "hang_timeout_s": 30.0, **limits}

    def generate(self, *shards: list[Request | None]) -> list[list[Outcome | None] | None]:
        async def work() -> list[list[Outcome | None] | None]:
            dispatcher = Dispatcher(self.fleet, on_outcome=lambda request, outcome: None, **self.limits)
            return await asyncio.gather(*(dispatcher.generate(shard) for shard in shards))

        return asyncio.run(asyncio.wait_for(work(), 120))

    def status(self) -> dict[str, Any]:
        return dict(ray.get(self.fleet.status.remote()))

    def close(self) -> None:
        ray.get(self.fleet.stop.remote())
        ray.kill(self.fleet)


def kinds(outcomes: list[Outcome | None] | None) -> dict[int, tuple[str, int]]:
    assert outcomes is not None
    return {
        row: (outcome.result.failure.kind, outcome.attempts)
        for row, outcome in enumerate(outcomes)
        if outcome is not None and outcome.result.failure is not None
    }


def check_texts(outcomes: list[Outcome | None] | None) -> None:
    assert outcomes is not None
    for row, outcome in enumerate(outcomes):
        assert outcome is not None
        if outcome.result.failure is None:
            assert outcome.result.samples[0].text == expected_text(row)


@pytest.mark.parametrize(
    ("action", "kind", "limits"),
    [
        ("crash", "engine_crash", {}),
        ("raise", "engine_crash", {}),
        ("hang", "engine_hang", {"hang_timeout_s": 3}),
        ("error", "request_error", {}),
        ("never", "request_timeout", {"timeout_s": 1.0}),
    ],
)
def test_a_bad_row_fails_after_three_attempts_and_its_neighbours_succeed(
    local_ray: None, action: str, kind: str, limits: dict[str, float]
) -> None:
    timeout_s = limits.pop("timeout_s", 60.0)
    run = Run(ScriptedConfig(faults={1037: action}), 2, **limits)
    try:
        [outcomes] = run.generate(requests_for(range(100), timeout_s))
        assert kinds(outcomes) == {37: (kind, 3)}
        check_texts(outcomes)
    finally:
        run.close()


def test_what_the_engine_refuses_by_rule_is_not_tried_again(local_ray: None) -> None:
    run = Run(ScriptedConfig(faults={1037: "refuse"}), 2)
    try:
        [outcomes] = run.generate(requests_for(range(100)))
        assert kinds(outcomes) == {37: ("request_refused", 1)}
    finally:
        run.close()


def test_an_error_that_passes_is_retried_to_success(local_ray: None) -> None:
    run = Run(ScriptedConfig(faults={1003: "error_once"}), 1)
    try:
        [outcomes] = run.generate(requests_for(range(10)))
        assert outcomes is not None
        assert kinds(outcomes) == {}
        assert outcomes[3] is not None
        assert outcomes[3].attempts == 2
        check_texts(outcomes)
    finally:
        run.close()


def test_replicas_killed_from_outside_are_replaced_and_no_row_is_lost(local_ray: None, tmp_path: Path) -> None:
    config = ScriptedConfig(max_num_seqs=16, steps_per_request=2, step_delay_s=0.01, journal=str(tmp_path))
    run = Run(config, 2)

    async def kill_twice() -> None:
        killed: set[int] = set()
        deadline = time.monotonic() + 60
        while len(killed) < 2 and time.monotonic() < deadline:
            for log in tmp_path.glob("*.log"):  # noqa: ASYNC240  a few local names
                pid = int(log.stem)
                if pid not in killed and log.stat().st_size > 400 and len(killed) < 2:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            await asyncio.sleep(0.01)
        assert len(killed) == 2

    async def work() -> list[Outcome | None] | None:
        dispatcher = Dispatcher(run.fleet, on_outcome=lambda request, outcome: None, **run.limits)
        outcomes, _ = await asyncio.gather(dispatcher.generate(requests_for(range(2000))), kill_twice())
        return outcomes

    try:
        outcomes = asyncio.run(asyncio.wait_for(work(), 120))
        assert kinds(outcomes) == {}
        check_texts(outcomes)
        assert run.status()["num_losses"] == 2
    finally:
        run.close()


def test_a_model_that_never_loads_ends_the_run_with_its_reason(local_ray: None) -> None:
    run = Run(ScriptedConfig(fail_start="weights are corrupt"), 1)
    try:
        with pytest.raises(InfrastructureError, match="weights are corrupt"):
            run.generate(requests_for(range(4)))
    finally:
        run.close()


def test_an_engine_that_dies_on_every_row_ends_the_run_instead_of_restarting_for_ever(local_ray: None) -> None:
    run = Run(ScriptedConfig(faults={1: "raise"}), 1)
    try:
        with pytest.raises(InfrastructureError, match=r"10 replicas in a row died.*engine core died by script"):
            run.generate(requests_for(range(300)))
    finally:
        run.close()


@pytest.mark.long  # 15 starts of an engine
@pytest.mark.timeout(300)
def test_a_dozen_killers_that_lie_together_fail_and_all_others_succeed(local_ray: None) -> None:
    """They are the last rows, so that nothing else gets done meanwhile."""
    killers = range(100, 112)
    run = Run(ScriptedConfig(max_num_seqs=16, faults={1000 + row: "raise" for row in killers}), 1)
    try:
        [outcomes] = run.generate(requests_for(range(112)))
        assert kinds(outcomes) == dict.fromkeys(killers, ("engine_crash", 3))
        check_texts(outcomes)
    finally:
        run.close()


def _drained(run: Run, action: str) -> list[list[Outcome | None] | None]:
    async def work() -> list[list[Outcome | None] | None]:
        dispatcher = Dispatcher(run.fleet, on_outcome=lambda request, outcome: None, **run.limits)
        shards: list[Coroutine[Any, Any, list[Outcome | None] | None]] = [
            dispatcher.generate(requests_for(range(200))) for _ in range(5)
        ]
        tasks = [asyncio.ensure_future(shard) for shard in shards]
        while dispatcher.num_in_flight == 0:  # noqa: ASYNC110  the dispatcher tells nobody
            await asyncio.sleep(0.005)
        getattr(dispatcher, action)()
        return await asyncio.gather(*tasks)

    return asyncio.run(asyncio.wait_for(work(), 60))


def test_draining_finishes_shards_already_begun_and_drops_the_others(local_ray: None) -> None:
    run = Run(ScriptedConfig(max_num_seqs=32, step_delay_s=0.02), 1)
    try:
        outcomes = _drained(run, "drain")
        assert outcomes[0] is not None
        assert kinds(outcomes[0]) == {}
        assert outcomes[-1] is None
    finally:
        run.close()


def test_abandoning_drops_every_unfinished_shard_at_once(local_ray: None) -> None:
    run = Run(ScriptedConfig(max_num_seqs=32, step_delay_s=0.2, steps_per_request=50), 1)
    try:
        assert _drained(run, "abandon") == [None] * 5
    finally:
        run.close()


def test_a_replica_once_lost_never_comes_back_however_late_the_fleet_hears_of_it(local_ray: None) -> None:
    """The fleet still names the dead for a while; believing it would charge innocent rows with more deaths."""
    run = Run(ScriptedConfig(max_num_seqs=4, step_delay_s=0.02, faults={1005: "crash"}), 2)
    slow = _SlowToHear(run.fleet)

    async def work() -> list[Outcome | None] | None:
        dispatcher = Dispatcher(slow, on_outcome=lambda request, outcome: None, **run.limits)
        return await dispatcher.generate(requests_for(range(120)))

    try:
        outcomes = asyncio.run(asyncio.wait_for(work(), 90))
        assert kinds(outcomes) == {5: ("engine_crash", 3)}
        assert run.status()["num_losses"] == 3
    finally:
        run.close()


class _SlowToHear:
    """A fleet whose `report` takes 300 ms to arrive; everything else is the real one."""

    def __init__(self, fleet: Any) -> None:
        self.watch = fleet.watch
        self.report = self
        self._report = fleet.report

    async def remote(self, *arguments: Any) -> Any:
        await asyncio.sleep(0.3)
        return await self._report.remote(*arguments)


def test_a_shard_that_arrives_after_the_fleet_gave_up_fails_instead_of_waiting(local_ray: None) -> None:
    run = Run(ScriptedConfig(fail_start="weights are corrupt"), 1)

    async def work() -> None:
        dispatcher = Dispatcher(run.fleet, on_outcome=lambda request, outcome: None, **run.limits)
        for _ in range(2):
            with pytest.raises(InfrastructureError, match="weights are corrupt"):
                await dispatcher.generate(requests_for(range(4)))

    try:
        asyncio.run(asyncio.wait_for(work(), 60))
    finally:
        run.close()


def test_a_pool_that_cannot_start_does_not_stop_the_others(local_ray: None) -> None:
    good = PoolPlan("good", 1, ScriptedConfig(start_delay_s=6))
    bad = PoolPlan("bad", 1, ScriptedConfig(fail_start="no such weights"))
    fleet = start_fleet([bad, good])

    async def work() -> list[Outcome | None] | None:
        limits: dict[str, Any] = {"max_attempts": 3, "hang_timeout_s": 30.0}
        dispatcher = Dispatcher(fleet, on_outcome=lambda request, outcome: None, **limits)
        return await dispatcher.generate(requests_for(range(20)))

    try:
        assert kinds(asyncio.run(asyncio.wait_for(work(), 90))) == {}
    finally:
        ray.get(fleet.stop.remote())
        ray.kill(fleet)


def test_cancelled_requests_free_the_engine_for_the_next_consumer(local_ray: None) -> None:
    run = Run(ScriptedConfig(max_num_seqs=8, step_delay_s=0.05, steps_per_request=2, faults={1000: "never"}), 1)

    async def abandon() -> None:
        dispatcher = Dispatcher(run.fleet, on_outcome=lambda request, outcome: None, **run.limits)
        endless: list[Request | None] = [Request("", [1, 1000], SAMPLING, None) for _ in range(8)]
        shard = asyncio.ensure_future(dispatcher.generate(endless))
        while dispatcher.num_in_flight == 0:  # noqa: ASYNC110  the dispatcher tells nobody
            await asyncio.sleep(0.005)
        dispatcher.abandon()
        assert await shard is None

    try:
        asyncio.run(asyncio.wait_for(abandon(), 60))
        # All 8 places of the engine were taken by requests that never end.
        [outcomes] = run.generate(requests_for(range(1, 20)))
        assert kinds(outcomes) == {}
    finally:
        run.close()


@pytest.mark.long
def test_a_run_that_falls_silent_for_long_gets_its_rows_back_when_it_wakes_up(local_ray: None) -> None:
    """What its requests would have cost is saved, and none is left unanswered."""
    config = ScriptedConfig(max_num_seqs=4, step_delay_s=0.2, steps_per_request=25, consumer_gone_s=2.0)
    run = Run(config, 1)

    async def work() -> list[Outcome | None] | None:
        dispatcher = Dispatcher(run.fleet, on_outcome=lambda request, outcome: None, **run.limits)
        shard = asyncio.ensure_future(dispatcher.generate(requests_for(range(10))))
        while dispatcher.num_in_flight < 8:  # noqa: ASYNC110  the dispatcher tells nobody
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.5)
        time.sleep(5)  # noqa: ASYNC251  the whole process stands still
        return await shard

    try:
        outcomes = asyncio.run(asyncio.wait_for(work(), 60))
        assert kinds(outcomes) == {}
        check_texts(outcomes)
    finally:
        run.close()
