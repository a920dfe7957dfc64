"""Words to be repeated: pure copying, shown first because every other kind of copying builds on it."""

from __future__ import annotations

import random

from tests.tiny_training.examples import Example, ask
from tests.tiny_training.names import made_up_word, piece


def echo_example(rng: random.Random, *, pieces: int | None = None) -> Example:
    """Made-up words and numbers, of training only."""
    return _echo([_word(rng, pieces) for _ in range(rng.randint(3, 10))])


def pieces_example(rng: random.Random, *, pieces: int) -> Example:
    """Words of one token each, out of so many."""
    return _echo([piece(rng, pieces) for _ in range(rng.randint(8, 20))])


def _echo(words: list[str]) -> Example:
    return Example(task="echo", language="en", messages=ask(f"Repeat: {' '.join(words)}"), answer=" ".join(words))


def _word(rng: random.Random, pieces: int | None) -> str:
    if rng.random() < 0.2:
        return str(rng.randrange(100_000))
    return made_up_word(rng, capital=rng.random() < 0.7, pieces=pieces)
