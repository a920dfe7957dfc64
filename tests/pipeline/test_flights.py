"""A dispatcher that replicas took for dead, and that wakes up: what was given up is sent again, and nothing hangs.

Dispatcher and replicas are the real ones, in one process; `tests/faults/test_replica_faults.py` has them as actors.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.dispatcher import Dispatcher
from pipeline.engine import Piece, Request
from pipeline.membership import Member, Membership
from pipeline.replica import Replica
from pipeline.settings import SamplingSettings
from tests.in_process_fleet import remote, requests, until
from tests.scripted_engine import ScriptedConfig

NEVER = 77
ROWS = 40


class Line:
    """A fleet of one replica, called as if it were elsewhere; polls get through while the line is open."""

    def __init__(self, replica: Replica, member: Member) -> None:
        self.replica = replica
        self.open = asyncio.Event()
        self.open.set()
        self.num_polls = 0
        self.fleet = SimpleNamespace(watch=remote(self._watch))
        self._member = member

    @classmethod
    async def to(cls, config: ScriptedConfig) -> Line:
        replica = Replica(config)
        info = await replica.info()
        names = ("submit", "abort", "recall", "cancel")
        handle = SimpleNamespace(**{name: remote(getattr(replica, name)) for name in names})
        line = cls(replica, Member("only", handle, info))
        handle.poll = remote(line._poll)
        return line

    async def _poll(self, consumer: str, wait_s: float) -> Any:
        await self.open.wait()
        self.num_polls += 1
        return await self.replica.poll(consumer, wait_s)

    async def _watch(self, version: int, wait_s: float) -> Membership:
        if version == 1:
            await asyncio.sleep(wait_s)
        return Membership(1, {"only": self._member})

    @property
    def is_forgotten(self) -> bool:
        """Whether the replica has nothing of anybody."""
        requests = self.replica._engine.requests
        return not len(self.replica._mailboxes) and not requests.num_begun + requests.num_waiting


def dispatcher(line: Line, **more: Any) -> Dispatcher:
    return Dispatcher(line.fleet, max_attempts=3, hang_timeout_s=60.0, on_outcome=lambda *_: None, **more)


@pytest.mark.parametrize("begins_at_once", [False, True])
def test_rows_that_begin_alike_are_sent_together_but_in_turn_where_somebody_waits_for_each(
    begins_at_once: bool,
) -> None:
    async def work() -> list[int]:
        line, sent = await Line.to(ScriptedConfig()), []

        async def submit(batch: list[Request]) -> None:
            sent.extend(request.prompt_token_ids[1] for request in batch)
            await line.replica.submit(batch)

        line._member.handle.submit = remote(submit)
        sampling = SamplingSettings(temperature=0, max_tokens=2)
        asked = [Request("", [1, *[500 + n % 3] * 100, 1000 + n], sampling, None) for n in range(12)]
        outcomes = await dispatcher(line, begins_at_once=begins_at_once).generate(asked)
        assert outcomes is not None
        assert all(outcome is not None and outcome.result.failure is None for outcome in outcomes)
        return sent

    sent = asyncio.run(asyncio.wait_for(work(), 60))
    assert sent == ([500, 501, 502] * 4 if begins_at_once else [500] * 4 + [501] * 4 + [502] * 4)


def test_one_that_was_silent_for_long_gets_every_row_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were done and not told are done again too; none is charged with an attempt."""
    monkeypatch.setattr("pipeline.consumers.CONSUMER_GONE_S", 0.5)

    async def body() -> None:
        line = await Line.to(ScriptedConfig(max_num_seqs=4, steps_per_request=5, step_delay_s=0.02))
        mine = dispatcher(line)
        shard = asyncio.ensure_future(mine.generate(requests(*[5] * ROWS)))
        await until(lambda: line.num_polls and mine.num_in_flight)
        line.open.clear()
        await until(lambda: line.is_forgotten)
        assert mine.num_in_flight > 0
        line.open.set()
        outcomes = await asyncio.wait_for(shard, 20)
        assert outcomes is not None
        assert [(one.attempts, one.result.failure) for one in outcomes if one] == [(1, None)] * ROWS

    asyncio.run(body())


def test_an_answer_that_somebody_has_begun_to_read_fails_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.consumers.CONSUMER_GONE_S", 0.5)

    async def body() -> None:
        line = await Line.to(ScriptedConfig(max_num_seqs=4, step_delay_s=0.01, faults={NEVER: "never"}))
        pieces: list[tuple[int, Piece]] = []
        mine = dispatcher(line)
        told = mine.generate(requests(NEVER, stream=True), on_piece=lambda *one: pieces.append(one))
        shard = asyncio.ensure_future(told)
        await until(lambda: pieces)
        line.open.clear()
        await until(lambda: line.is_forgotten)
        line.open.set()
        [outcome] = await asyncio.wait_for(shard, 20) or [None]
        assert outcome is not None
        assert outcome.result.failure is not None

    asyncio.run(body())
