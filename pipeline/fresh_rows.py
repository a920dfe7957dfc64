"""Rows that no replica has seen: the oldest goes next, or one whose prompt begins as the last one's did. Pure.

An engine keeps the KV cache of what it has computed while there is room. Rows about the same document that lie apart in
the input each have it computed again; sent one after the other, only the first has.

Guarantees:
- every row added is taken once, discarded, or still here.
- the oldest row is taken after `MAX_PASSED` others at most, however many are added that begin alike; those put back are
  taken next.
- without prompts, or where they share no more than all do, rows are taken in the order they were added.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from pipeline.engine import TokenIds

MIN_GAIN = 64
"""Tokens that a row must share with the last one beyond what the oldest row does: four blocks of vLLM's cache."""
MAX_PASSED = 256
"""Rows that may be taken before the oldest one: its shard is done no later than some others."""
NEAR = 32
"""Rows back to which an earlier one counts as near in the input: they meet in any case."""
APART_SHARE = 0.1
"""Of rows that have more in common with one further back than with those near: from it on more are waited for."""
MEMORY_ROWS = 256
"""Rows over which that share is averaged."""
MAX_PROMPT_BYTES = 64 << 20
"""Of waiting prompts, four to a token: no more are waited for beyond it."""
MAX_COMPARED = 4096
"""Tokens of a prompt that are looked at: what is shared beyond them adds little to what is gained by those."""
TOKEN_BYTES = 4

Row = TypeVar("Row")


def prompt_bytes(token_ids: TokenIds) -> bytes:
    """A prompt as `FreshRows` compares it; empty for one too short to gain by it."""
    return np.asarray(token_ids[:MAX_COMPARED], np.int32).tobytes() if len(token_ids) >= MIN_GAIN else b""


def shared_tokens(one: bytes, other: bytes) -> int:
    """Tokens with which both prompts begin."""
    count = min(len(one), len(other)) // TOKEN_BYTES
    differ = np.frombuffer(one, np.int32, count) != np.frombuffer(other, np.int32, count)
    return int(differ.argmax()) if differ.any() else count


class FreshRows(Generic[Row]):
    """A queue in which rows with the same beginning find each other."""

    def __init__(self) -> None:
        self._rows: OrderedDict[int, tuple[Row, bytes]] = OrderedDict()
        """Number -> row and prompt, the oldest first."""
        self._by_prompt: list[tuple[bytes, int]] = []
        """Sorted, so that those that share most stand side by side; prompts too short to gain by it are left out."""
        self._near: deque[bytes] = deque()
        self._near_by_prompt: list[tuple[bytes]] = []
        """The last prompts added, taken or not, sorted likewise."""
        self._num_added = self._num_put_back = 0
        self._num_bytes = 0
        self._apart = 0.0
        self._num_passed = 0
        """Rows taken since the oldest one was."""
        self._is_in_order = False

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def wants_more(self) -> bool:
        """Whether rows with the same beginning come so far apart that with more rows here more would meet."""
        return self._apart >= APART_SHARE and self._num_bytes < MAX_PROMPT_BYTES

    def add(self, row: Row, prompt: bytes = b"") -> None:
        """Queue a row behind all others."""
        self._num_added += 1
        self._rows[self._num_added] = row, prompt
        is_apart = is_long(prompt) and self._has_like_only_far_back(prompt)
        self._apart += (is_apart - self._apart) / MEMORY_ROWS
        self._file(prompt, self._num_added)

    def put_back(self, row: Row, prompt: bytes) -> None:
        """Queue a row before all others."""
        self._num_put_back -= 1
        self._rows[self._num_put_back] = row, prompt
        self._rows.move_to_end(self._num_put_back, last=False)
        self._file(prompt, self._num_put_back)

    def take(self, after: bytes = b"") -> tuple[Row, bytes]:
        """Remove and return the row to send after one with that prompt, and its own.

        Raises:
            KeyError: no row is here.
        """
        if not self._rows:
            raise KeyError("no row is here")
        number = oldest = next(iter(self._rows))
        may_pass = oldest > 0 and is_long(after) and not self._is_in_order and self._num_passed < MAX_PASSED
        if may_pass and (near := _beside(self._by_prompt, after)):
            shared, nearest = max((shared_tokens(after, prompt), -number) for prompt, number in near)
            if shared - shared_tokens(after, self._rows[oldest][1]) >= MIN_GAIN:
                number = -nearest
        if oldest > 0:
            self._num_passed = 0 if number == oldest else self._num_passed + 1
        row, prompt = self._rows.pop(number)
        self._unfile(prompt, number)
        return row, prompt

    def go_in_order(self) -> None:
        """Have rows taken in the order they were added from now on."""
        self._is_in_order = True

    def discard(self, is_gone: Callable[[Row], bool]) -> None:
        """Forget the rows of which this is true."""
        for number, (row, prompt) in list(self._rows.items()):
            if is_gone(row):
                del self._rows[number]
                self._unfile(prompt, number)

    def _has_like_only_far_back(self, prompt: bytes) -> bool:
        """Whether it shares more with a row that is here than with any of those added last; then it is one of those."""
        shared = max((shared_tokens(prompt, other) for other, _ in _beside(self._by_prompt, prompt)), default=0)
        shared_near = max(
            (shared_tokens(prompt, other) for (other,) in _beside(self._near_by_prompt, prompt)), default=0
        )
        insort(self._near_by_prompt, (prompt,))
        self._near.append(prompt)
        if len(self._near) > NEAR:
            del self._near_by_prompt[bisect_left(self._near_by_prompt, (self._near.popleft(),))]
        return shared - shared_near >= MIN_GAIN

    def _file(self, prompt: bytes, number: int) -> None:
        if is_long(prompt):
            insort(self._by_prompt, (prompt, number))
            self._num_bytes += len(prompt)

    def _unfile(self, prompt: bytes, number: int) -> None:
        if is_long(prompt):
            del self._by_prompt[bisect_left(self._by_prompt, (prompt, number))]
            self._num_bytes -= len(prompt)


def is_long(prompt: bytes) -> bool:
    """Whether something can be gained by what it begins with."""
    return len(prompt) >= MIN_GAIN * TOKEN_BYTES


def _beside(by_prompt: Sequence[tuple[Any, ...]], prompt: bytes) -> Sequence[tuple[Any, ...]]:
    """Entries of a sorted list between which the prompt would stand: one of them shares most with it."""
    at = bisect_left(by_prompt, (prompt,))
    return by_prompt[max(0, at - 1) : at + 1]
