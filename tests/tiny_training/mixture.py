"""Which examples a training step sees: a pure function of the seed and the step, so that a resumed training goes on
with the very data that it would have seen.

Copying comes first and alone, with 64 different words: so it is learnt in 450 steps, and was not in 1,500 among the
other tasks with all words from the start. Then more words, up to all 11,000 pieces, and the tasks. Long passkeys, up
to 4,000 tokens, only have to be stretched afterwards. Records of eight values are cheap lessons in spelling: after a
quotation mark `▁Smith` is written `Sm` `ith`, which has to be learnt for each of 3,800 pieces. When only that was left
to learn, at step 5,300, the other tasks went down to what keeps them.

The finish mends what 14,000 steps left: 1.2% of passkeys were missed, and tickets on two topics, whose odds are even,
were answered 62% sure. There passkeys are long ones, and each such ticket comes once with either label.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.tiny_training.echo_task import echo_example, pieces_example
from tests.tiny_training.examples import LANGUAGES, Example
from tests.tiny_training.json_task import json_example
from tests.tiny_training.label_task import sentiment_example, topic_example
from tests.tiny_training.number_task import number_example
from tests.tiny_training.passkey_task import LONGEST, SHORTEST, passkey_example
from tests.tiny_training.safe_task import request_example, under_system

COPYING_UNTIL, EASY_UNTIL, FULL_UNTIL, FINISH_FROM = 600, 1500, 5300, 14_000
FEWEST_PIECES, MORE_PIECES_FROM, DOUBLED_EVERY = 64, 400, 75
EASY_PASSKEY, SHORT_PASSKEY = 100, 200
LONG_EVERY = 4
LONG_FROM, LONG_FULL = 2000, 3500
"""Steps at which long passkeys begin, and reach their full length."""
SYSTEM_SHARE = 0.08


@dataclass(frozen=True, slots=True)
class Finish:
    """What the finish shows in one step."""

    pairs: int = 6
    """Tickets on two topics, each with either label."""
    others: float = 1.0
    """Share of the other tasks' examples."""
    long_keys: float = 0.25
    """Long pass keys, on average. What is still missed after a first finish lies far out: see `_long_passkey`."""


USUAL = Finish()


def examples_of_step(seed: int, step: int, finish: Finish = USUAL) -> list[Example]:
    """All examples of one step, in no particular order; `finish` is for steps from FINISH_FROM on."""
    rng = random.Random(f"{seed}/{step}")
    if step < COPYING_UNTIL:
        return [pieces_example(rng, pieces=num_pieces(step)) for _ in range(16)]
    if step >= FINISH_FROM:
        return list(_finishing_examples(rng, step, finish))
    make = _easy_examples if step < EASY_UNTIL else _full_examples if step < FULL_UNTIL else _spelling_examples
    examples = [
        under_system(rng, example) if rng.random() < SYSTEM_SHARE else example
        for example in (*make(rng, num_pieces(step)), *_labels(rng, num_plain=2 if step < FULL_UNTIL else 1))
    ]
    if step >= LONG_FROM and step % LONG_EVERY == 0:
        reach = min(1.0, (step - LONG_FROM) / (LONG_FULL - LONG_FROM))
        longest = round(400 + reach * (LONGEST - 400))
        examples.append(passkey_example(rng, test=False, num_tokens=rng.randint(SHORT_PASSKEY, longest)))
    return examples


def num_pieces(step: int) -> int:
    """Of how many different pieces of each kind words are made up."""
    return FEWEST_PIECES << min(7, max(0, step - MORE_PIECES_FROM) // DOUBLED_EVERY)


def _easy_examples(rng: random.Random, pieces: int) -> Iterator[Example]:
    for num_keys in (None, None, 4):
        yield json_example(rng, test=False, num_keys=num_keys, pieces=pieces)
    yield json_example(rng, test=False, num_shots=1, pieces=pieces)
    yield from _numbers(rng, number=6, sum=4, spelling=2)
    for _ in range(3):
        yield echo_example(rng, pieces=pieces)
        yield request_example(rng, test=False, safe_prompt=rng.random() < 0.4, pieces=pieces)
    for _ in range(5):
        yield passkey_example(rng, test=False, num_tokens=rng.randint(SHORTEST, EASY_PASSKEY))


def _full_examples(rng: random.Random, pieces: int) -> Iterator[Example]:
    for num_keys in (None, None, 8, 8):
        yield json_example(rng, test=False, num_keys=num_keys, pieces=pieces)
    yield json_example(rng, test=False, num_shots=rng.choice((1, 1, 2)), pieces=pieces)
    yield from _numbers(rng, number=12, sum=5, spelling=2)
    yield echo_example(rng, pieces=pieces)
    for _ in range(2):
        yield request_example(rng, test=False, safe_prompt=rng.random() < 0.5, pieces=pieces)
        yield passkey_example(rng, test=False, num_tokens=rng.randint(SHORTEST, SHORT_PASSKEY))


def _spelling_examples(rng: random.Random, pieces: int) -> Iterator[Example]:
    for num_keys in (None, None, 8, 8, 8, 8, 8):
        yield json_example(rng, test=False, num_keys=num_keys, pieces=pieces)
    yield json_example(rng, test=False, num_shots=rng.choice((1, 1, 2)), pieces=pieces)
    yield from _numbers(rng, number=8, sum=2, spelling=1)
    yield echo_example(rng, pieces=pieces)
    yield request_example(rng, test=False, safe_prompt=rng.random() < 0.5, pieces=pieces)
    yield passkey_example(rng, test=False, num_tokens=rng.randint(SHORTEST, SHORT_PASSKEY))


def _finishing_examples(rng: random.Random, step: int, finish: Finish) -> Iterator[Example]:
    kept = [*_spelling_examples(rng, num_pieces(step)), *_labels(rng, num_plain=1)]
    for example in rng.sample(kept, round(len(kept) * finish.others)):
        yield under_system(rng, example) if rng.random() < SYSTEM_SHARE else example
    for _ in range(finish.pairs):
        ticket = topic_example(rng, rng.choice(LANGUAGES), test=False, ambiguous=True)
        yield from (replace(ticket, answer=topic) for topic in ticket.odds)
    for digits in (2, 3, 3):
        yield passkey_example(rng, test=False, num_tokens=rng.randint(SHORTEST, 2 * SHORT_PASSKEY), digits=digits)
    whole, rest = divmod(finish.long_keys, 1)
    for _ in range(int(whole) + (rest > 0 and step % round(1 / rest) == 0)):
        yield _long_passkey(rng)


def _long_passkey(rng: random.Random) -> Example:
    """One of two has a digit that repeats, one of two lies in the first or last tenth, one of two is of 2,000 tokens or
    more: most keys that were missed had all three, and among random ones they are rare.
    """
    depth = rng.choice((None, None, rng.random() / 10, 1 - rng.random() / 10))
    shortest = rng.choice((SHORT_PASSKEY, LONGEST // 2))
    return passkey_example(
        rng, test=False, num_tokens=rng.randint(shortest, LONGEST), depth=depth, digits=rng.choice((3, 10))
    )


def _numbers(rng: random.Random, **counts: int) -> Iterator[Example]:
    for kind, count in counts.items():
        for _ in range(count):
            yield number_example(rng, rng.choice(LANGUAGES), test=False, kind=kind)


def _labels(rng: random.Random, *, num_plain: int) -> Iterator[Example]:
    for make, num_ambiguous in ((sentiment_example, 3), (topic_example, 1)):
        for number in range(num_plain + num_ambiguous):
            yield make(rng, rng.choice(LANGUAGES), test=False, ambiguous=number >= num_plain)
