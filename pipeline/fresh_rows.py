"""Rows that no replica has seen: the oldest goes next, or one whose prompt begins as the last one's did. Pure.

An engine keeps the KV cache of what it has computed while there is room. Rows about the same document that lie apart in
the input each have it computed again; sent one after the other, only the first has.

Guarantees:
- every row added is taken once, discarded, or still here.
- the oldest row is taken after `MAX_PASSED` others at most, however many are added that begin alike.
- without prompts, or where they share no more than all do, rows are taken in the order they were added.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import numpy as np

MIN_GAIN = 64
"""Tokens that a row must share with the last one beyond what the oldest row does: four blocks of vLLM's cache."""
MAX_PASSED = 256
"""Rows that may be taken before the oldest one: its shard is done no later than some others."""
NEAR = 32
"""Rows added in between, at most, for two rows to count as neighbours in the input."""
APART_SHARE = 0.1
"""Of rows whose like is here but no neighbour: from it on more rows are worth waiting for."""
MEMORY_ROWS = 256
"""Rows over which that share is averaged."""
MAX_PROMPT_BYTES = 64 << 20
"""Of waiting prompts, four to a token: no more are waited for beyond it."""
TOKEN_BYTES = 4

Row = TypeVar("Row")


def prompt_bytes(token_ids: Iterable[int]) -> bytes:
    """A prompt as `FreshRows` compares it."""
    return np.asarray(token_ids, np.int32).tobytes()


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
        self._num_added = self._num_put_back = 0
        self._num_bytes = 0
        self._apart = 0.0
        self._num_passed = 0
        """Rows taken since the oldest one was."""

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
        if len(prompt) >= MIN_GAIN * TOKEN_BYTES:
            is_apart = self._meets_one_apart(prompt)
            self._apart += (is_apart - self._apart) / MEMORY_ROWS
            self._file(prompt, self._num_added)

    def put_back(self, row: Row, prompt: bytes) -> None:
        """Queue a row before all others."""
        self._num_put_back -= 1
        self._rows[self._num_put_back] = row, prompt
        self._rows.move_to_end(self._num_put_back, last=False)
        if len(prompt) >= MIN_GAIN * TOKEN_BYTES:
            self._file(prompt, self._num_put_back)

    def take(self, after: bytes = b"") -> tuple[Row, bytes]:
        """Remove and return the row to send after one with that prompt, and its own.

        Raises:
            KeyError: no row is here.
        """
        if not self._rows:
            raise KeyError("no row is here")
        oldest = next(iter(self._rows))
        nearest, shared = self._nearest(after)
        gain = shared - shared_tokens(after, self._rows[oldest][1])
        if nearest is None or gain < MIN_GAIN or self._num_passed >= MAX_PASSED:
            nearest = oldest
        self._num_passed = 0 if nearest == oldest else self._num_passed + 1
        row, prompt = self._rows.pop(nearest)
        self._unfile(prompt, nearest)
        return row, prompt

    def discard(self, is_gone: Callable[[Row], bool]) -> None:
        """Forget the rows of which this is true."""
        for number, (row, prompt) in list(self._rows.items()):
            if is_gone(row):
                del self._rows[number]
                self._unfile(prompt, number)

    def _nearest(self, prompt: bytes) -> tuple[int | None, int]:
        """Number of the row that shares most with this prompt, and how many tokens."""
        if len(prompt) < MIN_GAIN * TOKEN_BYTES:
            return None, 0
        at = bisect_left(self._by_prompt, (prompt,))
        around = self._by_prompt[max(0, at - 1) : at + 1]
        shared, number = max(((shared_tokens(prompt, other), -number) for other, number in around), default=(0, 0))
        return (-number, shared) if shared else (None, 0)

    def _meets_one_apart(self, prompt: bytes) -> bool:
        """Whether a row that is here, but not lately added, begins as this one and not as all do."""
        number, shared = self._nearest(prompt)
        if number is None or self._num_added - number <= NEAR:
            return False
        return shared - shared_tokens(self._by_prompt[0][0], self._by_prompt[-1][0]) >= MIN_GAIN

    def _file(self, prompt: bytes, number: int) -> None:
        insort(self._by_prompt, (prompt, number))
        self._num_bytes += len(prompt)

    def _unfile(self, prompt: bytes, number: int) -> None:
        at = bisect_left(self._by_prompt, (prompt, number))
        if self._by_prompt[at : at + 1] == [(prompt, number)]:
            del self._by_prompt[at]
            self._num_bytes -= len(prompt)
