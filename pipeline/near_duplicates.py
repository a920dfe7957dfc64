"""Texts that are like an earlier one: equal, or sharing at least so many runs of five characters. Pure.

MinHash finds candidates, and the runs themselves decide: a text is dropped only for what it really shares. Whoever asks
in one order always gets one answer. Knows nothing of records.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHINGLE_CHARS = 5
NUM_PERMUTATIONS = 128
_LEAST_RECALL = 0.99
"""Chance to find a pair that is just as similar as is asked; more similar ones have a higher one."""


def normalised(text: str) -> str:
    """The text less what doesn't make another text: upper case and runs of spaces."""
    return " ".join(text.casefold().split())


def shingles(text: str) -> NDArray[np.uint32]:
    """Hashes of a normalised text's runs of five characters, sorted, each once; of a shorter text, its own."""
    data = normalised(text)
    runs = {data[place : place + SHINGLE_CHARS] for place in range(max(1, len(data) - SHINGLE_CHARS + 1))}
    hashes = [zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs]
    return np.unique(np.array(hashes, np.uint32))


def jaccard(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """Share of what both have in what either has."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


class DuplicateFinder:
    """Remembers texts, and says of each new one whether it is like one before."""

    def __init__(self, *, exact: bool, near: float | None) -> None:
        """With `near` None only equal texts are found."""
        self._exact = exact
        self._near = near
        self._by_digest: dict[bytes, str] = {}
        self._kept: dict[str, NDArray[np.uint32]] = {}
        self._index: Any = None
        if near is not None:
            from datasketch import MinHashLSH

            self._index = MinHashLSH(num_perm=NUM_PERMUTATIONS, params=_bands(near))

    def check(self, key: str, text: str) -> tuple[str, str, float] | None:
        """Kind of likeness, key of the first text that this one is like, and Jaccard; None and remembered if none."""
        digest = hashlib.blake2b(normalised(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if self._exact and digest in self._by_digest:
            return "exact_duplicate", self._by_digest[digest], 1.0
        runs = shingles(text)
        sketch = self._sketch(runs)
        if sketch is not None and (found := self._most_like(runs, self._index.query(sketch))) is not None:
            return "near_duplicate", *found
        self._by_digest[digest] = key
        if sketch is not None:
            self._kept[key] = runs
            self._index.insert(key, sketch, check_duplication=False)
        return None

    def _sketch(self, runs: NDArray[np.uint32]) -> Any:
        if self._index is None:
            return None
        from datasketch import MinHash

        sketch = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, hashfunc=int)
        sketch.update_batch(runs.tolist())
        return sketch

    def _most_like(self, runs: NDArray[np.uint32], candidates: list[str]) -> tuple[str, float] | None:
        similar = [(key, jaccard(runs, self._kept[key])) for key in candidates]
        enough = [each for each in similar if self._near is not None and each[1] >= self._near]
        return min(enough, key=lambda each: (-each[1], each[0])) if enough else None


def _bands(near: float) -> tuple[int, int]:
    """Bands and rows of each: as many rows as still find a pair of that Jaccard with a chance of 0.99."""
    found = {rows: 1 - (1 - near**rows) ** (NUM_PERMUTATIONS // rows) for rows in range(1, 17)}
    rows = max(rows for rows, chance in found.items() if chance >= _LEAST_RECALL)
    return NUM_PERMUTATIONS // rows, rows
