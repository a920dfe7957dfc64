"""The proof that two runs part at ties only can fail: it finds the place where they part, and how near it was."""

from __future__ import annotations

import numpy as np
import pytest

from tests.near_ties import Scores, gap_at_parting

NUM_PROMPT = 3


def scores() -> Scores:
    """Six tokens, two layers, four experts; every choice is 1.0 better than the next, but for two ties."""
    router = np.tile(np.array([4, 3, 2, 1], np.float32), (6, 2, 1))
    router[1, 1] = [4, 3, 3 - 1e-6, 1]
    logits = [np.array([1, 2, 3], np.float32) for _ in range(6)]
    logits[3] = np.array([1, 3 - 1e-6, 3], np.float32)
    return Scores(logits, router)


def ids(**others: list[int]) -> np.ndarray:
    """Each token's two best experts, with other ones from a token on, `t1` in layer 1 and `t4` in both."""
    chosen = np.tile(np.array([0, 1], np.uint8), (6, 2, 1))
    for name, experts in others.items():
        token = int(name[1:])
        chosen[token, 1 if token == 1 else slice(None)] = experts
    return chosen


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (ids(t1=[0, 2], t4=[3, 2]), 0),  # the router's tie, and what followed from it
        (ids(t1=[2, 1]), 1),  # not the two that tie
        (ids(t2=[1, 0]), 1),
        (ids(t4=[3, 2]), 0),  # the token before it was a tie
        (ids(t5=[3, 2]), 1),
        (ids()[:4], 0),  # ended where the next token was a tie
        (ids()[:5], 1),
    ],
)
def test_the_first_difference_counts_whatever_follows(other: np.ndarray, expected: float) -> None:
    assert gap_at_parting(ids(), other, scores(), NUM_PROMPT) == pytest.approx(expected, abs=1e-5)
