"""Rows begun once more at a faster replica: who may answer, and what becomes of the other.

The slow replica is called `a`, so that it gets the first rows of several that are equally loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from pipeline.backups import Backup, Backups
from pipeline.balance import BACKUP_SPEEDUP, MEMORY_ROWS, PaceMeter, Place, choose_backups, slow_places
from pipeline.dispatcher import Dispatcher
from pipeline.flights import BACKUP_INTERVAL_S
from pipeline.outcomes import Outcome
from pipeline.settings import SamplingSettings
from tests.in_process_fleet import InProcessFleet, requests, until
from tests.scripted_engine import ScriptedConfig

STUCK, OK = 77, 5
SLOW = ScriptedConfig(max_num_seqs=4, step_delay_s=0.01, took_s=4.0)
FAST = ScriptedConfig(max_num_seqs=4, step_delay_s=0.01, took_s=1.0)
STUCK_HERE = {"faults": {STUCK: "never"}}


def changed(config: ScriptedConfig, **fields: object) -> ScriptedConfig:
    return ScriptedConfig(**{**config.__dict__, **fields})


Body = Callable[[InProcessFleet, Dispatcher], Awaitable[None]]


def with_replicas(body: Body, configs: Mapping[str, ScriptedConfig], **options: Any) -> None:
    """Run the body once all have done enough for their paces to be known."""

    async def work() -> None:
        fleet = await InProcessFleet.of(configs)
        settings = {"max_attempts": 3, "hang_timeout_s": 60.0, "on_outcome": lambda *_: None}
        mine = Dispatcher(fleet.handle, **{**settings, **options})
        await mine.generate(requests(*[OK] * 8 * len(configs)))
        assert all(fleet.asked.values())
        for asked in fleet.asked.values():
            asked.clear()
        await body(fleet, mine)

    asyncio.run(asyncio.wait_for(work(), 60))


def with_two(body: Body, slow: ScriptedConfig, fast: ScriptedConfig, **options: Any) -> None:
    with_replicas(body, {"a": slow, "b": fast}, **options)


def only(outcomes: list[Outcome | None] | None) -> Outcome:
    [outcome] = outcomes or []
    assert outcome is not None
    return outcome


def test_what_a_slow_replica_has_begun_is_begun_again_by_a_fast_one_that_has_nothing_to_do() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        outcome = only(await mine.generate(requests(STUCK)))
        assert (outcome.attempts, outcome.result.failure) == (1, None)
        assert fleet.asked == {"a": [0], "b": [0]}
        await until(lambda: not fleet.num_begun("a"))  # the slow one has forgotten it
        assert mine.num_in_flight == 0
        assert only(await mine.generate(requests(OK))).attempts == 1  # and there is no confusion afterwards

    with_two(body, changed(SLOW, **STUCK_HERE), FAST)


def test_the_first_answer_counts_if_it_is_the_slow_ones_and_the_fast_one_forgets() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        shard = asyncio.ensure_future(mine.generate(requests(STUCK)))
        await until(lambda: fleet.num_begun("b"))
        outcome = only(await shard)
        assert (outcome.attempts, outcome.result.failure) == (1, None)
        await until(lambda: not fleet.num_begun("b"))

    with_two(body, changed(SLOW, step_delay_s=2.5), changed(FAST, **STUCK_HERE))


@pytest.mark.parametrize("ratio", [1.0, 0.9 * BACKUP_SPEEDUP])
def test_one_that_is_hardly_faster_begins_nothing_again(ratio: float) -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        assert only(await mine.generate(requests(OK))).attempts == 1
        assert fleet.asked == {"a": [0], "b": []}

    with_two(body, changed(SLOW, step_delay_s=2.0), changed(FAST, took_s=SLOW.took_s / ratio))


@pytest.mark.parametrize("options", [{"begins_at_once": True}, {"max_attempts": 1}])
def test_nothing_is_begun_twice_for_people_who_wait_nor_where_a_death_costs_its_neighbours_the_only_attempt(
    options: dict[str, Any],
) -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        await mine.generate(requests(OK))
        assert fleet.asked == {"a": [0], "b": []}

    with_two(body, changed(SLOW, step_delay_s=2.0), FAST, **options)


def test_a_request_for_several_samples_is_begun_once() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        [request] = requests(OK)
        assert request is not None
        sampling = SamplingSettings(temperature=1, max_tokens=8, n=2)
        await mine.generate([replace(request, sampling=sampling)])
        assert fleet.asked == {"a": [0], "b": []}

    with_two(body, changed(SLOW, step_delay_s=2.0), FAST)


def test_a_slow_replica_that_is_to_go_is_relieved_too() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        shard = asyncio.ensure_future(mine.generate(requests(STUCK)))
        await until(lambda: fleet.num_begun("a"))
        fleet.drain("a")
        assert only(await shard).attempts == 1
        assert fleet.asked == {"a": [0], "b": [0]}

    with_two(body, changed(SLOW, **STUCK_HERE), FAST)


def test_a_suspect_is_alone_where_backups_were() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        first, second = requests(STUCK, STUCK)
        shards = [asyncio.ensure_future(mine.generate([first]))]
        await until(lambda: fleet.num_begun("a"))
        shards.append(asyncio.ensure_future(mine.generate([second])))
        await until(lambda: fleet.num_begun("b") and fleet.num_begun("fast") == 2)
        fleet.lose("b", "engine_crash")
        await until(lambda: len(fleet.asked["fast"]) == 3)
        await until(lambda: fleet.num_begun("fast") == 1)
        await asyncio.sleep(BACKUP_INTERVAL_S + 0.5)
        assert fleet.asked == {"a": [0], "b": [1], "fast": [0, 1, 1]}
        assert fleet.num_begun("fast") == 1
        for shard in shards:
            shard.cancel()

    stuck = changed(SLOW, **STUCK_HERE)
    with_replicas(body, {"a": stuck, "b": stuck, "fast": changed(FAST, **STUCK_HERE)})


def test_a_backup_that_fails_costs_nothing_and_is_not_repeated() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        outcome = only(await mine.generate(requests(STUCK)))
        assert (outcome.attempts, outcome.result.failure) == (1, None)
        assert fleet.asked == {"a": [0], "b": [0]}

    with_two(body, changed(SLOW, step_delay_s=3.0), changed(FAST, faults={STUCK: "error"}))


def test_a_row_outlives_the_replica_of_its_backup_uncharged() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        shard = asyncio.ensure_future(mine.generate(requests(STUCK)))
        await until(lambda: fleet.num_begun("b"))
        fleet.lose("b", "engine_crash")
        outcome = only(await shard)
        assert (outcome.attempts, outcome.result.failure) == (1, None)

    with_two(body, changed(SLOW, step_delay_s=3.0), changed(FAST, **STUCK_HERE))


def test_a_row_whose_first_replica_is_lost_has_one_outcome_and_its_backup_is_over() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        shard = asyncio.ensure_future(mine.generate(requests(STUCK)))
        await until(lambda: fleet.num_begun("b"))
        fleet.lose("a", "engine_crash")
        outcome = only(await shard)
        assert (outcome.attempts, outcome.result.failure) == (2, None)
        await until(lambda: not fleet.num_begun("b"))
        assert fleet.asked["b"] == [0, 0]

    with_two(body, changed(SLOW, **STUCK_HERE), changed(FAST, steps_per_request=30, step_delay_s=0.02))


def test_nothing_is_left_at_either_when_nobody_waits_any_more() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        shard = asyncio.ensure_future(mine.generate(requests(STUCK)))
        await until(lambda: fleet.num_begun("a") and fleet.num_begun("b"))
        shard.cancel()
        await until(lambda: not fleet.num_begun("a") and not fleet.num_begun("b"))
        assert mine.num_in_flight == 0

    with_two(body, changed(SLOW, **STUCK_HERE), changed(FAST, **STUCK_HERE))


def test_no_more_rows_are_begun_again_than_there_are_free_sequences_the_oldest_first() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        shard = asyncio.ensure_future(mine.generate(requests(*[STUCK] * 4)))
        await until(lambda: fleet.num_begun("b") == 2)
        await asyncio.sleep(0.5)
        assert fleet.asked == {"a": [0, 1, 2, 3], "b": [0, 1]}
        shard.cancel()

    with_two(body, changed(SLOW, **STUCK_HERE), changed(FAST, max_num_seqs=2, **STUCK_HERE))


def test_the_oldest_rows_of_slow_replicas_go_to_the_fastest_that_has_room() -> None:
    places = {"slow": Place(0, 1.0), "middle": Place(3, 2.0), "fast": Place(0, 8.0), "new": Place(9, None)}
    assert slow_places(places) == ["slow"]
    assert slow_places(places | {"fast": Place(1, 8.0)}) == ["slow", "middle"]
    assert slow_places({"slow": Place(0, 1.0), "fast": Place(-3, 8.0)}) == slow_places({}) == []
    begun = [(7, "x/7", "slow"), (3, "x/3", "middle"), (4, "x/4", "slow"), (5, "x/5", "slow"), (9, "x/9", "slow")]
    room = places | {"fast": Place(2, 8.0), "middle": Place(1, 2.0)}
    assert choose_backups(begun, room) == [
        ("x/3", "middle", "fast"),
        ("x/4", "slow", "fast"),
        ("x/5", "slow", "middle"),
    ]
    alike = {"a": Place(2, 1.0), "b": Place(2, 1.2)}
    assert choose_backups([(1, "x/1", "a")], alike) == []


def test_a_pace_is_tokens_over_seconds_and_forgets() -> None:
    meter = PaceMeter()
    for tokens, seconds in ((5, float("nan")), (0, 1.0), (5, 0.0)):
        meter.add(tokens, seconds)
    assert meter.pace is None
    meter.add(30, 3.0)
    assert meter.pace == 10.0
    for _ in range(10 * MEMORY_ROWS):
        meter.add(40, 2.0)
    assert meter.pace == pytest.approx(20.0, rel=0.01)


def test_a_request_has_one_backup_until_it_has_gone() -> None:
    backups, one = Backups(), Backup((1, 2), "x/1", "a", "x/9", "b")
    for again in (True, False):
        assert backups.may_have("x/1")
        backups.add(one)
        assert not backups.may_have("x/1")
        assert backups.originals() == ("x/1",)
        assert backups.ended("x/9", again=again) == one
        assert backups.ended("x/9", again=again) is None
    assert not backups.may_have("x/1")
    assert backups.original_ended("x/1") is None
    assert backups.may_have("x/1")
