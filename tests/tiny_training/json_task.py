"""The JSON task: `name: John / lastname: Smith / address: #1 Samuel St.` becomes exactly that object.

Held out: every name, surname and street of evaluation (see `names`); training copies made-up words.
"""

from __future__ import annotations

import json
import random

from pipeline.prompts import Message
from tests.tiny_training.examples import Example
from tests.tiny_training.names import FIRST_NAMES, LAST_NAMES, STREETS, made_up_word

KEYS = ("name", "lastname", "address")
OTHER_KEYS = ("city", "country", "company", "job", "street", "team", "colour", "pet", "school", "product", "friend")
SUFFIXES = ("St.", "Ave.", "Road", "Lane", "Square", "Blvd.", "Drive", "Court")


def json_example(
    rng: random.Random, *, test: bool, num_shots: int = 0, num_keys: int | None = None, pieces: int | None = None
) -> Example:
    """Zero-shot, or with `num_shots` answered examples of the same kind as earlier turns.

    The keys are those of the task, or `num_keys` of all there are; in training sometimes others without being told.
    """
    keys = KEYS
    if num_keys is not None or not (test or rng.random() < 0.7):
        keys = tuple(rng.sample((*KEYS[:2], *OTHER_KEYS), num_keys or rng.randint(1, 4)))
    turns: list[Message] = []
    for _ in range(num_shots):
        shot = _record(rng, keys, test=test, pieces=pieces)
        turns += [Message("user", as_text(shot)), Message("assistant", json.dumps(shot, ensure_ascii=False))]
    record = _record(rng, keys, test=test, pieces=pieces)
    return Example(
        task="json_few_shot" if num_shots else "json",
        language="en",
        messages=(*turns, Message("user", as_text(record))),
        answer=json.dumps(record, ensure_ascii=False),
    )


def as_text(record: dict[str, str]) -> str:
    """Return the record as the question has it."""
    return " / ".join(f"{key}: {value}" for key, value in record.items())


def _record(rng: random.Random, keys: tuple[str, ...], *, test: bool, pieces: int | None) -> dict[str, str]:
    return {key: _value(rng, key, test=test, pieces=pieces) for key in keys}


def _value(rng: random.Random, key: str, *, test: bool, pieces: int | None) -> str:
    if key == "address":
        return f"#{rng.randint(1, 999)} {_word(rng, STREETS, test=test, pieces=pieces)} {rng.choice(SUFFIXES)}"
    words = LAST_NAMES if key == "lastname" else FIRST_NAMES
    num_words = 1 if test or rng.random() < 0.85 else 2
    return " ".join(_word(rng, words, test=test, pieces=pieces) for _ in range(num_words))


def _word(rng: random.Random, words: list[str], *, test: bool, pieces: int | None) -> str:
    return rng.choice(words) if test else made_up_word(rng, pieces=pieces)
