"""How different texts are from each other, measured on a sample that only their keys decide. Pure."""

from __future__ import annotations

import heapq
import itertools
from hashlib import blake2b

from pipeline.near_duplicates import jaccard, normalised, shingles

SAMPLE = 2000
"""Texts that figures are taken from, at most."""
PAIRED = 200
"""Of these, texts that are compared each with each other."""


class DiversitySample:
    """Keeps the texts whose keys have the smallest hashes, in whatever order they come."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, str, str]] = []

    def add(self, key: str, text: str) -> None:
        """Look at one text."""
        rank = int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        entry = (-rank, key, text)
        if len(self._kept) < SAMPLE:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heappushpop(self._kept, entry)

    def figures(self) -> dict[str, float | int | None]:
        """`distinct_1` to `distinct_3`: different runs of so many words by all there are (Li et al. 2016, section 5).

        `self_similarity`: mean Jaccard of runs of five characters, over all pairs of up to 200 texts; null for one.
        """
        texts = [text for _, _, text in sorted(self._kept, reverse=True)]
        runs = [shingles(text) for text in texts[:PAIRED]]
        pairs = [jaccard(one, other) for one, other in itertools.combinations(runs, 2)]
        return {
            "sampled_records": len(texts),
            **{f"distinct_{length}": _distinct(texts, length) for length in (1, 2, 3)},
            "self_similarity": round(sum(pairs) / len(pairs), 4) if pairs else None,
        }


def _distinct(texts: list[str], length: int) -> float | None:
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = normalised(text).split()
        runs = [tuple(words[place : place + length]) for place in range(len(words) - length + 1)]
        seen.update(runs)
        total += len(runs)
    return round(len(seen) / total, 4) if total else None
