"""Text that a JSON schema allows, drawn byte by byte from a seed: what a constrained engine would generate.

The library that constrains vLLM says at each byte which may follow, so that any schema it takes is followed.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np

_LETTERS = b"etaoin shrdlu"
MAX_BYTES = 20_000


def json_text(schema: str, seed: int) -> str:
    """JSON by the schema (JSON text); strings without a limit have some twenty letters."""
    from llguidance import LLMatcher, numpy

    draw = random.Random(seed)
    grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
    matcher = LLMatcher(_bytes(), grammar)
    mask = numpy.allocate_token_bitmask(1, _bytes().vocab_size)
    written = bytearray()
    while not matcher.is_stopped() and len(written) < MAX_BYTES:
        if forced := matcher.compute_ff_bytes():
            matcher.consume_tokens(list(forced))
            written += forced
            continue
        numpy.fill_next_token_bitmask(matcher, mask, 0)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8)[0, :40], bitorder="little")).tolist()
        token = _choose(draw, allowed)
        if token > 255:  # the end
            break
        matcher.consume_token(token)
        written.append(token)
    assert not matcher.get_error(), matcher.get_error()
    return written.decode()


def _choose(draw: random.Random, allowed: list[int]) -> int:
    """Likelier to close what is open than chance would be, and to write letters rather than signs."""
    open_ended = len(allowed) > 100
    closing = [each for each in allowed if each in b'"]}' or each > 255]
    if closing and draw.random() < (0.05 if open_ended else 0.5):
        return draw.choice(closing)
    letters = [each for each in allowed if each in _LETTERS]
    return draw.choice(letters or [each for each in allowed if each not in b"\\"] or allowed)


@cache
def _bytes() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
