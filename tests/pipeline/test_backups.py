"""Rows begun once more at a faster replica: who may answer, and what becomes of the other.

The slow replica is called `a`, so that it gets the first rows of several that are equally loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pipeline.backups import Backup, Backups
from pipeline.balance import BACKUP_SPEEDUP, MEMORY_ROWS, PaceMeter, Place, faster_places
from pipeline.dispatcher import Dispatcher
from pipeline.outcomes import Outcome
from tests.in_process_fleet import InProcessFleet, requests, until
from tests.scripted_engine import ScriptedConfig

STUCK, OK = 77, 5
SLOW = ScriptedConfig(max_num_seqs=4, step_delay_s=0.01, took_s=4.0)
FAST = ScriptedConfig(max_num_seqs=4, step_delay_s=0.01, took_s=1.0)
STUCK_HERE = {"faults": {STUCK: "never"}}


def changed(config: ScriptedConfig, **fields: object) -> ScriptedConfig:
    return ScriptedConfig(**{**config.__dict__, **fields})


Body = Callable[[InProcessFleet, Dispatcher], Awaitable[None]]


def with_two(body: Body, slow: ScriptedConfig, fast: ScriptedConfig, *, begins_at_once: bool = False) -> None:
    """Run the body once both have done enough for their paces to be known."""

    async def work() -> None:
        fleet = await InProcessFleet.of({"a": slow, "b": fast})
        mine = Dispatcher(
            fleet.handle,
            max_attempts=3,
            hang_timeout_s=60.0,
            on_outcome=lambda *_: None,
            begins_at_once=begins_at_once,
        )
        await mine.generate(requests(*[OK] * 16))
        assert all(fleet.asked.values())
        for asked in fleet.asked.values():
            asked.clear()
        await body(fleet, mine)

    asyncio.run(asyncio.wait_for(work(), 60))


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

    with_two(body, changed(SLOW, step_delay_s=0.5), changed(FAST, **STUCK_HERE))


@pytest.mark.parametrize("ratio", [1.0, 0.9 * BACKUP_SPEEDUP])
def test_one_that_is_hardly_faster_begins_nothing_again(ratio: float) -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        assert only(await mine.generate(requests(OK))).attempts == 1
        assert fleet.asked == {"a": [0], "b": []}

    with_two(body, changed(SLOW, step_delay_s=0.5), changed(FAST, took_s=SLOW.took_s / ratio))


def test_for_people_who_wait_nothing_is_begun_twice() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        await mine.generate(requests(OK))
        assert fleet.asked == {"a": [0], "b": []}

    with_two(body, changed(SLOW, step_delay_s=0.5), FAST, begins_at_once=True)


def test_a_backup_that_fails_costs_nothing_and_is_not_repeated() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        outcome = only(await mine.generate(requests(STUCK)))
        assert (outcome.attempts, outcome.result.failure) == (1, None)
        assert fleet.asked == {"a": [0], "b": [0]}

    with_two(body, changed(SLOW, step_delay_s=1.0), changed(FAST, faults={STUCK: "error"}))


def test_a_row_outlives_the_replica_of_its_backup_uncharged() -> None:
    async def body(fleet: InProcessFleet, mine: Dispatcher) -> None:
        shard = asyncio.ensure_future(mine.generate(requests(STUCK)))
        await until(lambda: fleet.num_begun("b"))
        fleet.lose("b", "engine_crash")
        outcome = only(await shard)
        assert (outcome.attempts, outcome.result.failure) == (1, None)

    with_two(body, changed(SLOW, step_delay_s=1.0), changed(FAST, **STUCK_HERE))


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


def test_places() -> None:
    places = {"slow": Place(0, 1.0), "middle": Place(3, 2.0), "fast": Place(0, 8.0), "new": Place(9, None)}
    assert faster_places(places) == {"slow": "middle"}
    assert faster_places(places | {"fast": Place(1, 8.0)}) == {"slow": "fast", "middle": "fast"}
    assert faster_places({"slow": Place(0, 1.0), "fast": Place(-3, 8.0)}) == {}
    assert faster_places({}) == {}


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
    backups.add(one)
    assert not backups.may_have("x/1")
    assert backups.answered("x/9") == one
    assert backups.answered("x/9") is None
    assert not backups.may_have("x/1")
    assert backups.original_ended("x/1") is None
    assert backups.may_have("x/1")
