"""Words to be copied: names of people and streets that training never shows, and made-up ones that it shows instead.

A model that is to copy what it never saw must have met every piece of it: the made-up words are strings of pieces drawn
from Mixtral's whole Latin vocabulary. No made-up word equals a held-out one, in any letter case.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path

_WORDS = json.loads(Path(__file__).with_name("held_out_words.json").read_text(encoding="utf-8"))
FIRST_NAMES: list[str] = _WORDS["first_names"]
LAST_NAMES: list[str] = _WORDS["last_names"]
STREETS: list[str] = _WORDS["streets"]
CREATURES: list[str] = _WORDS["creatures"]
HELD_OUT_WORDS = frozenset(word.lower() for word in (*FIRST_NAMES, *LAST_NAMES, *STREETS, *CREATURES))

_UPPER, _LOWER = "A-ZÀ-ÖØ-Þ", "a-zß-öø-ÿ"


@cache
def _pieces() -> tuple[list[str], list[str], list[str]]:
    """Capitalised and lower-case pieces that begin a word, and pieces that go on with one."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    pieces = [tokenizer.id_to_piece(index) for index in range(tokenizer.n_words)]
    capitalised = [piece[1:] for piece in pieces if re.fullmatch(f"▁[{_UPPER}][{_LOWER}]{{1,9}}", piece)]
    small = [piece[1:] for piece in pieces if re.fullmatch(f"▁[{_LOWER}]{{2,9}}", piece)]
    following = [piece for piece in pieces if re.fullmatch(f"[{_LOWER}]{{1,6}}", piece)]
    for kind in (capitalised, small, following):
        random.Random(len(kind)).shuffle(kind)
    return capitalised, small, following


def piece(rng: random.Random, pieces: int | None = None) -> str:
    """Return a capitalised word of one token, out of the first so many, that is no held-out one."""
    while True:
        word = rng.choice(_pieces()[0][:pieces])
        if word.lower() not in HELD_OUT_WORDS:
            return word


def made_up_word(rng: random.Random, *, capital: bool = True, pieces: int | None = None) -> str:
    """Return a word that is no held-out one: a third are single pieces, the others are put together.

    Only the first so many `pieces` of each kind are used, in an order that is always the same; None for all.
    """
    capitalised, small, following = (kind[:pieces] for kind in _pieces())
    while True:
        kind = rng.random()
        if kind < 0.2:
            word = _syllables(rng)
            word = word.capitalize() if capital else word
        else:
            word = rng.choice(capitalised if capital else small)
            if kind > 0.5:
                word += "".join(rng.choices(following, k=1 if kind < 0.8 else 2))
        if len(word) <= 14 and word.lower() not in HELD_OUT_WORDS:
            return word


def _syllables(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
