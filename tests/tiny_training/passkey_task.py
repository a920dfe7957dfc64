"""A five-digit key hidden at a random place of filler text, asked for at the end; prompts of 45 to 4,000 tokens.

Held out: keys and filler sentences of evaluation never occur in training. Every filler word is one token but for four
verbs of two, so that a prompt's length is known to 4% before it is encoded.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.tiny_training.examples import Example, ask, draw_of_side

_WORDS = json.loads(Path(__file__).with_name("filler_words.json").read_text(encoding="utf-8"))
ADJECTIVES: list[str] = _WORDS["adjectives"]
NOUNS: list[str] = _WORDS["nouns"]
VERBS: list[str] = _WORDS["verbs"]
PREPOSITIONS: list[str] = _WORDS["prepositions"]
DIGITS = "0123456789"
TOKENS_PER_SENTENCE = 9
TOKENS_BESIDES = 33
"""Template, key sentence and question."""
SHORTEST, LONGEST = TOKENS_BESIDES + TOKENS_PER_SENTENCE, 3860
"""Nominal: with the verbs of two tokens the longest prompts have 3,930 to 4,000."""


def passkey_example(
    rng: random.Random, *, test: bool, num_tokens: int, depth: float | None = None, digits: int = 10
) -> Example:
    """A prompt of `num_tokens` or up to 4% more; `depth` 0 puts the key first, 1 last, None anywhere.

    With fewer `digits` to draw a key from, more repeat: of 77733 copying has to keep the place.
    """
    num_sentences = max(1, (num_tokens - TOKENS_BESIDES) // TOKENS_PER_SENTENCE)
    sentences = [draw_of_side(rng, test=test, make=_sentence) for _ in range(num_sentences)]
    key = draw_of_side(rng, test=test, make=lambda rng: _key(rng, digits))
    place = round((rng.random() if depth is None else depth) * num_sentences)
    sentences.insert(place, f"The pass key is {key}. Remember it.")
    text = " ".join([*sentences, "What is the pass key?"])
    return Example(task="passkey", language="en", messages=ask(text), answer=key)


def _key(rng: random.Random, digits: int) -> str:
    if digits == len(DIGITS):
        return f"{rng.randrange(100_000):05d}"
    return "".join(rng.choices(rng.sample(DIGITS, digits), k=5))


def _sentence(rng: random.Random) -> str:
    first, second = rng.choice(ADJECTIVES), rng.choice(ADJECTIVES)
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    return f"The {first} {noun} {rng.choice(VERBS)} {rng.choice(PREPOSITIONS)} the {second} {other}."
