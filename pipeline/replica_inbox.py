"""What the engine's thread is told: new requests, and what to do about earlier ones."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from pipeline.engine import Request

IDLE_WAIT_S = 0.05
"""How long the engine thread sleeps on an empty inbox; a new request wakes it at once."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget everything of one consumer, and whatever of it still arrives: Ray may swap two calls on their way."""

    consumer: str


@dataclass(frozen=True, slots=True)
class Recall:
    """Give back up to `count` requests that the engine hasn't got yet."""

    consumer: str
    count: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget these requests, also if they are still to arrive: see `Cancel`."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """Give back all that the engine hasn't got yet, and whatever is still submitted."""


Message = Request | Cancel | Recall | Abort | Drain


class Inbox:
    """Messages from the actor's event loop to the engine's thread, in order."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def __len__(self) -> int:
        return self._messages.qsize()

    def put(self, message: Message) -> None:
        """Add one; from any thread."""
        self._messages.put(message)

    def take(self, *, wait: bool) -> list[Message]:
        """Everything there is; with `wait`, sleep for a moment until there is something."""
        messages: list[Message] = []
        try:
            if wait:
                messages.append(self._messages.get(timeout=IDLE_WAIT_S))
            while True:
                messages.append(self._messages.get_nowait())
        except queue.Empty:
            return messages
