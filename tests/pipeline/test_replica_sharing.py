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


def request(consumer: str, number: int, *, priority: int, ids: tuple[int, ...] = (1, 2), **more: Any) -> Request:
    sampling = SamplingSettings(max_tokens=4, temperature=0)
    return Request(f"{consumer}/{number}", ids, sampling, 1, priority=priority, **more)


async def answers(replica: Replica, consumer: str, count: int) -> list[RowResult]:
    found: list[RowResult] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found += (await replica.poll(consumer, 1.0)).results
    return found


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
