"""Who of a fleet takes work, who has gone and why, and whether there is hope: what is told to everyone who watches.

Plain bookkeeping on one event loop; it asks nobody and ends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipeline.membership import Departure, Member, Membership


class Roster:
    """The members of a fleet.

    Guarantees:
    - every change has a version of its own, and wakes up all who wait for one.
    - why a replica has gone is noted once, the first time.
    """

    def __init__(self) -> None:
        self._version = 0
        self._changed = asyncio.Event()
        self._members: dict[str, Member] = {}
        self._departed: deque[tuple[str, Departure]] = deque(maxlen=1000)
        self._losses: deque[dict[str, str]] = deque(maxlen=100)
        self.num_losses = 0
        self.verdict: tuple[str, int] | None = None
        """Why there will be no replica any more, and the exit code of a run that ends of it."""

    @property
    def members(self) -> Mapping[str, Member]:
        """Replicas that are up, draining ones too."""
        return self._members

    @property
    def losses(self) -> list[dict[str, str]]:
        """The latest replicas that died or were given up, oldest first."""
        return list(self._losses)

    async def watch(self, version: int, wait_s: float) -> Membership:
        """Return who is alive; see `pipeline.membership.Membership`."""
        if version == self._version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
        verdict = self.verdict[0] if self.verdict else None
        return Membership(self._version, dict(self._members), dict(self._departed), verdict)

    def join(self, replica: str, handle: Any, info: Any) -> None:
        """A replica is up; whatever spoke against hope does no more."""
        self.verdict = None
        self._members[replica] = Member(replica, handle, info)
        self.announce()

    def drain(self, replica: str) -> bool:
        """Have a member take nothing more; returns whether it is one."""
        member = self._members.get(replica)
        if member is None:
            return False
        self._members[replica] = replace(member, draining=True)
        self.announce()
        return True

    def lose(self, replica: str, kind: str, message: str) -> None:
        """Take note of a member's death, unless it is gone already."""
        if replica not in self._members:
            return
        self.num_losses += 1
        loss = {"replica": replica, "kind": kind, "message": message}
        self._losses.append({**loss, "at": datetime.now(UTC).isoformat(timespec="milliseconds")})
        self.depart(replica, Departure(kind, message))

    def depart(self, replica: str, departure: Departure) -> None:
        """Take note of a member's end, unless it is gone already."""
        if self._members.pop(replica, None) is not None:
            self._departed.append((replica, departure))
            self.announce()

    def departure_of(self, replica: str) -> Departure | None:
        """Why a replica has gone, as far as that is remembered."""
        return dict(self._departed).get(replica)

    def give_up(self, why: str, exit_code: int) -> None:
        """Lose hope, unless it is lost already."""
        if self.verdict is None:
            self.verdict = (why, exit_code)
            self.announce()

    def announce(self) -> None:
        """Wake up all who watch."""
        self._version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
