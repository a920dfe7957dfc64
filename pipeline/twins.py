"""Identical work once: a row whose request equals another's waits for that row's outcome, or takes it from memory.

Pure; knows rows as keys and requests as digests. Only greedy requests and those that choose among answers have digests:
their outcome is a function of the request. A failed outcome is shared with the rows that wait for it, never kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import Generic, TypeVar

import numpy as np

from pipeline.engine import TokenIds

MAX_KEPT_BYTES = 128 << 20
"""Of outcomes in memory: with Mixtral 8x7B's routing (2.3 kB a row) and 300 tokens of text about 30,000 of them."""

Key = TypeVar("Key")
Result = TypeVar("Result")


def request_digest(prompt_token_ids: TokenIds, sampling_json: str) -> bytes:
    """16 bytes that are equal for equal requests of one run."""
    ids = np.asarray(prompt_token_ids, np.int32).tobytes()
    return blake2b(ids + sampling_json.encode(), digest_size=16).digest()


class Twins(Generic[Key, Result]):
    """Who waits for whom.

    Guarantees:
    - of the unfinished keys of one digest exactly one leads; when it is dropped, another takes its place.
    - what is kept takes at most `max_bytes`, by the sizes given; the least recently used goes first.
    """

    def __init__(self, *, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, tuple[Result, int]] = OrderedDict()
        self._num_kept_bytes = 0
        self._leaders: dict[Key, bytes] = {}
        self._followers: dict[bytes, list[Key]] = {}
        """Digest of each leader -> those that wait for it."""

    def known(self, digest: bytes) -> Result | None:
        """The outcome of an equal request that is done and remembered."""
        found = self._kept.get(digest)
        if found is None:
            return None
        self._kept.move_to_end(digest)
        return found[0]

    def follows(self, key: Key, digest: bytes) -> bool:
        """Whether an unfinished key has this digest too, for which this one now waits; if not, this one leads."""
        if digest in self._followers:
            self._followers[digest].append(key)
            return True
        self._leaders[key] = digest
        self._followers[digest] = []
        return False

    def settled(self, key: Key, result: Result, *, size: int) -> list[Key]:
        """A key is done; returns those that waited for it. The result is kept if it has a size, in bytes."""
        digest = self._leaders.pop(key, None)
        if digest is None:
            return []
        if size:
            self._keep(digest, result, size)
        return self._followers.pop(digest)

    def drop(self, keys: Iterable[Key]) -> list[Key]:
        """Forget keys; returns those that waited for one of them and now lead."""
        gone = set(keys)
        for digest, followers in self._followers.items():
            if not gone.isdisjoint(followers):
                self._followers[digest] = [key for key in followers if key not in gone]
        promoted = []
        for leader in gone & self._leaders.keys():
            digest = self._leaders.pop(leader)
            followers = self._followers.pop(digest)
            if followers:
                promoted.append(followers[0])
                self._leaders[followers[0]] = digest
                self._followers[digest] = followers[1:]
        return promoted

    def _keep(self, digest: bytes, result: Result, size: int) -> None:
        self._kept[digest] = (result, size)
        self._num_kept_bytes += size
        while self._num_kept_bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self._num_kept_bytes -= freed
