"""Real replicas over scripted engines in this process, called as if they were actors elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from pipeline.engine import Request
from pipeline.membership import Departure, Member, Membership
from pipeline.replica import Replica
from pipeline.settings import SamplingSettings
from tests.scripted_engine import ScriptedConfig

CALLS = ("submit", "abort", "recall", "cancel", "poll")


class InProcessFleet:
    """Replicas by name; who is alive is told to whoever watches."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.asked: dict[str, list[int]] = {}
        """By replica the third token of each request that it was sent, in order; see `requests`."""
        self.handle = SimpleNamespace(watch=remote(self._watch))
        self._membership = Membership(0)
        self._changed = asyncio.Event()

    @classmethod
    async def of(cls, configs: Mapping[str, ScriptedConfig]) -> InProcessFleet:
        fleet = cls()
        members = {name: await fleet._member(name, config) for name, config in configs.items()}
        fleet._membership = Membership(1, members)
        return fleet

    async def _member(self, name: str, config: ScriptedConfig) -> Member:
        replica = self.replicas[name] = Replica(config)
        asked = self.asked[name] = []
        calls = {call: remote(getattr(replica, call)) for call in CALLS}

        async def submit(batch: list[Request]) -> None:
            asked.extend(request.prompt_token_ids[2] - 1000 for request in batch)
            await replica.submit(batch)

        return Member(name, SimpleNamespace(**calls | {"submit": remote(submit)}), await replica.info())

    def lose(self, name: str, kind: str) -> None:
        """The replica is gone, for all that anybody is told."""
        before = self._membership
        members = {other: member for other, member in before.members.items() if other != name}
        self._membership = Membership(before.version + 1, members, {name: Departure(kind)})
        self._changed.set()

    def drain(self, name: str) -> None:
        """The replica is to get nothing more."""
        before = self._membership
        members = before.members | {name: replace(before.members[name], draining=True)}
        self._membership = Membership(before.version + 1, members)
        self._changed.set()

    def num_begun(self, name: str) -> int:
        """Requests that its engine has."""
        return self.replicas[name]._engine.requests.num_begun

    async def _watch(self, version: int, wait_s: float) -> Membership:
        if version == self._membership.version:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
        return self._membership


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)


def remote(method: Callable[..., Awaitable[Any]]) -> Any:
    """As an actor's method."""
    return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(method(*arguments)))


def requests(*first_ids: int, **more: Any) -> list[Request | None]:
    """For each token one request that begins with it, numbered by its third."""
    sampling = SamplingSettings(temperature=0, max_tokens=8)
    return [Request("", [1, first, 1000 + n], sampling, None, **more) for n, first in enumerate(first_ids)]
