"""A replica that a run and an endpoint share: whose requests go first, who makes way, and what a withdrawal leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pipeline.engine import ONLINE_PRIORITY, Request
from pipeline.making_way import MAX_MADE_WAY
from pipeline.replica import Replica
from pipeline.replica_answers import RowResult
from pipeline.settings import SamplingSettings
from tests.scripted_engine import ScriptedConfig

NEVER = 77
SEATS = 8


def request(
    consumer: str, number: int, *, priority: int, ids: tuple[int, ...] = (1, 2), n: int = 1, **more: Any
) -> Request:
    sampling = SamplingSettings(max_tokens=4, temperature=0 if n == 1 else 1, n=n)
    return Request(f"{consumer}/{number}", ids, sampling, 1, priority=priority, **more)


async def answers(replica: Replica, consumer: str, count: int) -> list[RowResult]:
    found: list[RowResult] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found += (await replica.poll(consumer, 1.0)).results
    return found


async def news(replica: Replica, consumer: str) -> tuple[tuple[RowResult, ...], bool]:
    """The first results, and whether the consumer was told that it wasn't known."""
    async with asyncio.timeout(10):
        poll = await replica.poll(consumer, 1.0)
        is_first = poll.is_first
        while not poll.results:
            poll = await replica.poll(consumer, 1.0)
    return poll.results, is_first


def with_replica(body: Callable[[Replica], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        replica = Replica(ScriptedConfig(max_num_seqs=SEATS, step_delay_s=0.002, faults={NEVER: "never"}))
        await replica.info()
        await body(replica)

    asyncio.run(whole())


async def settled(replica: Replica, running: int, waiting: int) -> None:
    async with asyncio.timeout(10):
        while True:
            poll = await replica.poll("watcher", 0.01)
            if (poll.num_running, poll.num_waiting) == (running, waiting):
                return


def test_people_do_not_wait_for_runs_and_the_runs_requests_go_on_afterwards() -> None:
    async def body(replica: Replica) -> None:
        await replica.submit([request("run", n, priority=0, ids=(NEVER,)) for n in range(SEATS)])
        await settled(replica, SEATS, 0)
        await replica.submit([request("people", n, priority=ONLINE_PRIORITY) for n in range(3)])
        done = await answers(replica, "people", 3)
        assert [result.failure for result in done] == [None] * 3
        await settled(replica, SEATS - 1, 1)  # one in eight is kept free
        await replica.cancel("run")
        await settled(replica, 0, 0)

    with_replica(body)


def test_samples_are_counted_not_requests() -> None:
    """A run's four requests of two samples fill eight sequences; a person's four samples want four of them."""

    async def body(replica: Replica) -> None:
        await replica.submit([request("run", n, priority=0, ids=(NEVER,), n=2) for n in range(5)])
        await settled(replica, SEATS // 2, 1)
        await replica.submit([request("people", 0, priority=ONLINE_PRIORITY, ids=(NEVER,), n=4)])
        await settled(replica, 3, 3)
        assert sorted(replica._engine.requests.begun_ids()) == ["people/0", "run/0", "run/1"]
        await replica.abort(["people/0"])
        await settled(replica, 3, 2)  # 6 sequences: one of eight is kept free, which is less than another two
        await replica.submit([request("people", 1, priority=ONLINE_PRIORITY, ids=(NEVER,), n=2)])
        await settled(replica, 4, 2)  # nobody makes way for what is free

    with_replica(body)


def test_a_consumer_that_has_gone_is_forgotten_with_all_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.consumers.CONSUMER_GONE_S", 0.5)

    async def body(replica: Replica) -> None:
        for number in range(200):
            await replica.submit([request(f"run{number}", 1, priority=0)])
            await replica.poll(f"run{number}", 0.0)
        await replica.submit([request("killed", n, priority=0, ids=(NEVER,)) for n in range(SEATS)])
        assert (await replica.poll("killed", 0.0)).is_first
        assert not (await replica.poll("killed", 0.0)).is_first
        async with asyncio.timeout(10):
            while len(replica._mailboxes) > 1 or await replica.num_unfinished():
                await replica.poll("watcher", 0.01)
        assert not (await replica.poll("watcher", 0.01)).is_first
        # One that wakes up after all is told that it has to begin again, also when it speaks before it asks.
        await replica.submit([request("killed", SEATS, priority=0)])
        await settled(replica, 0, 0)
        [done], is_first = await news(replica, "killed")
        assert (done.request_id, done.failure, is_first) == (f"killed/{SEATS}", None, True)

    with_replica(body)


def test_a_cancelled_consumer_leaves_no_mailbox_and_no_request() -> None:
    async def body(replica: Replica) -> None:
        await replica.submit([request("run", n, priority=0, ids=(NEVER,)) for n in range(2 * SEATS)])
        await replica.poll("run", 0.0)
        await settled(replica, SEATS, SEATS)
        await replica.cancel("run")
        await settled(replica, 0, 0)
        async with asyncio.timeout(10):
            while len(replica._mailboxes) > 1:
                await replica.poll("watcher", 0.01)

    with_replica(body)


def test_a_request_makes_way_only_so_often() -> None:
    async def body(replica: Replica) -> None:
        await replica.submit([request("run", n, priority=0, ids=(NEVER,)) for n in range(SEATS - 1)])
        await settled(replica, SEATS - 1, 0)
        for turn in range(MAX_MADE_WAY + 1):
            mine = range(turn * SEATS, (turn + 1) * SEATS)
            await replica.submit([request("people", n, priority=ONLINE_PRIORITY, ids=(NEVER,)) for n in mine])
            await settled(replica, SEATS, SEATS - 1)
            stayed = sum(request_id.startswith("run/") for request_id in replica._engine.requests.begun_ids())
            assert stayed == (0 if turn < MAX_MADE_WAY else SEATS - 1)
            await replica.abort([f"people/{n}" for n in mine])
            await settled(replica, SEATS - 1, 0)

    with_replica(body)


@pytest.mark.parametrize("abort_first", [True, False])
def test_a_withdrawn_request_is_forgotten_even_when_its_withdrawal_comes_first(abort_first: bool) -> None:
    async def body(replica: Replica) -> None:
        mine = request("people", 1, priority=ONLINE_PRIORITY, ids=(NEVER,), stream=True)
        if abort_first:
            await replica.abort([mine.request_id])
            await replica.submit([mine])
        else:
            await replica.submit([mine])
            await settled(replica, 1, 0)
            await replica.abort([mine.request_id])
        await replica.submit([request("people", 2, priority=ONLINE_PRIORITY)])
        [done] = await answers(replica, "people", 1)
        assert done.request_id == "people/2"
        await settled(replica, 0, 0)

    with_replica(body)
