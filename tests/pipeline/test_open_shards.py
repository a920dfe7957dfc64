"""The gate before the dispatcher: shards wait there until what is open allows another."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.generate import GenerateSettings, GenerateStage
from pipeline.open_rows import OpenRows
from pipeline.settings import LimitSettings, RoutingSettings


class Monitor:
    """Answers at once, as the actor would."""

    def __init__(self) -> None:
        self.order, self.committed_rows = "run", 0
        self.post = SimpleNamespace(remote=self._post)

    async def _post(self, name: str, figures: Any) -> tuple[str, int]:
        return self.order, self.committed_rows


class Dispatch:
    """Holds each shard until it is let go."""

    def __init__(self) -> None:
        self.open: list[tuple[int, asyncio.Future[None]]] = []
        self.num_in_flight = self.num_replicas = self.num_finished = 0
        self.is_drained = self.wants_more = self.has_failed = False

    @property
    def num_open_rows(self) -> int:
        return sum(rows for rows, _ in self.open)

    @property
    def num_unfinished(self) -> int:
        return self.num_open_rows - self.num_finished

    async def generate(self, requests: list[Any], digests: Any) -> list[Any]:
        mine = (len(requests), asyncio.get_running_loop().create_future())
        self.open.append(mine)
        await mine[1]
        self.open.remove(mine)
        return [None] * len(requests)

    def let_go(self, count: int) -> None:
        for _, future in self.open[:count]:
            future.set_result(None)

    def drain(self) -> None:
        self.is_drained = True


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> GenerateStage:
    settings = GenerateSettings(0, "", pa.schema([]), RoutingSettings(), LimitSettings(), None, dedupe=False)
    limits = OpenRows(unfinished=25, begun=60, uncommitted=40, lookahead=30, rows_per_shard=10)
    stage = GenerateStage(None, Monitor(), settings, limits=limits)
    counters = SimpleNamespace(to_json_bytes=lambda: b"{}")
    stage._builder = SimpleNamespace(build=lambda prompts, outcomes: (prompts, counters))  # type: ignore[assignment]
    stage._dispatcher = Dispatch()  # type: ignore[assignment]
    monkeypatch.setattr("pipeline.generate.POST_INTERVAL_S", 0.01)
    monkeypatch.setattr("pipeline.generate.shard_requests", lambda prompts, settings: [None] * prompts.num_rows)
    return stage


async def open_rows_become(stage: GenerateStage, count: int) -> None:
    """Wait for it, and a little longer for it to stay so."""
    for _ in range(500):
        if stage._dispatcher.num_open_rows == count:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert stage._dispatcher.num_open_rows == count


def shards(count: int) -> list[pa.Table]:
    return [pa.table({"_tm_shard": pa.array([index] * 10, pa.int32())}) for index in range(count)]


def test_the_gate_lets_in_what_rows_allow_and_goes_on_with_what_is_committed(stage: GenerateStage) -> None:
    async def work() -> None:
        monitor, dispatch = stage._monitor, stage._dispatcher
        tasks = [asyncio.ensure_future(stage(shard)) for shard in shards(8)]
        await open_rows_become(stage, 30)  # begun while fewer than 25 were open
        dispatch.let_go(3)
        await open_rows_become(stage, 30)  # 30 finished wait for their commit, of 40
        dispatch.let_go(2)
        await open_rows_become(stage, 10)  # 50 do
        dispatch.let_go(1)
        await open_rows_become(stage, 0)
        monitor.committed_rows = 30
        await open_rows_become(stage, 20)  # the last two
        monitor.order = "drain"
        dispatch.let_go(2)
        await asyncio.gather(*tasks)
        for _ in range(500):
            if dispatch.is_drained:
                break
            await asyncio.sleep(0.01)
        assert dispatch.is_drained

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_drained_run_leaves_no_shard_at_the_gate(stage: GenerateStage) -> None:
    async def work() -> None:
        tasks = [asyncio.ensure_future(stage(shard)) for shard in shards(5)]
        await open_rows_become(stage, 30)
        stage._monitor.order = "drain"
        await open_rows_become(stage, 50)  # of which the real one drops what isn't begun
        stage._dispatcher.let_go(5)
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_more_shards_are_open_while_prompts_begin_alike_but_come_far_apart(stage: GenerateStage) -> None:
    async def work() -> None:
        dispatch = stage._dispatcher
        tasks = [asyncio.ensure_future(stage(shard)) for shard in shards(8)]
        await open_rows_become(stage, 30)
        dispatch.wants_more = True
        await open_rows_become(stage, 60)  # begun while fewer than 25 + 30 were open
        dispatch.wants_more = False
        dispatch.let_go(3)
        await open_rows_become(stage, 30)
        stage._monitor.order = "abandon"
        dispatch.abandon = lambda: dispatch.let_go(8)
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_shards_that_wait_for_their_last_rows_keep_no_others_out_until_there_are_many(stage: GenerateStage) -> None:
    async def work() -> None:
        dispatch = stage._dispatcher
        tasks = [asyncio.ensure_future(stage(shard)) for shard in shards(8)]
        await open_rows_become(stage, 30)
        dispatch.num_finished = 27
        await open_rows_become(stage, 60)  # 33 unfinished
        dispatch.num_finished = 55
        await open_rows_become(stage, 60)  # as many as may be begun
        stage._monitor.order = "abandon"
        dispatch.abandon = lambda: dispatch.let_go(8)
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_no_shard_waits_at_the_gate_of_a_dispatcher_whose_fleet_has_given_up(stage: GenerateStage) -> None:
    async def work() -> None:
        tasks = [asyncio.ensure_future(stage(shard)) for shard in shards(5)]
        await open_rows_become(stage, 30)
        stage._dispatcher.has_failed = True
        await open_rows_become(stage, 50)  # where each would raise
        stage._dispatcher.let_go(5)
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(work(), 30))
