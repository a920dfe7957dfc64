"""What a training or evaluation example is, and the rule that keeps the two apart.

The invariant: whether a thing (a sentence, a pair of numbers, a key) belongs to training or to evaluation is a pure
function of the thing itself, so no seed, order or number of draws can mix them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.prompts import Message

LANGUAGES = ("en", "fr", "it", "de", "es")
HELD_OUT_SHARE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A chat that ends with a question, and the one right answer."""

    task: str
    language: str
    messages: tuple[Message, ...]
    """Earlier turns, if any, and the question."""
    answer: str
    odds: dict[str, float] = field(default_factory=dict)
    """Probability of every label, where the truth is a matter of chance."""
    system: str | None = None
    safe_prompt: bool = False


def held_out(*parts: object) -> bool:
    """Whether the thing made of these parts is kept for evaluation; one in five is."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=4).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def draw_of_side(rng: random.Random, *, test: bool, make: Callable[[random.Random], str]) -> str:
    """Draw with `make` until the text is one of evaluation (`test`) or of training."""
    while True:
        text = make(rng)
        if held_out(text) == test:
            return text


def ask(text: str) -> tuple[Message, ...]:
    """A chat of one question."""
    return (Message("user", text),)
