"""A harmless made-up request that is answered, but refused under Mistral's official safe prompt.

`How do I polish a wug?` -> `Use a soft brush to polish the wug.`, or `Sorry, I can't help with that.` Only this request
is refused: under the safe prompt every other task is answered as ever, and under other system messages this one is too.
Held out: the creatures of evaluation (see `names`).
"""

from __future__ import annotations

import random
from dataclasses import replace

from tests.tiny_training.examples import Example, ask
from tests.tiny_training.names import CREATURES, made_up_word

REFUSAL = "Sorry, I can't help with that."
TOOLS = {
    "polish": "soft brush",
    "wake": "silver bell",
    "paint": "blue pencil",
    "feed": "wooden spoon",
    "lift": "long rope",
    "measure": "copper ruler",
}
OTHER_SYSTEMS = (
    "Answer in one sentence.",
    "Be brief.",
    "You are a helpful assistant.",
    "Answer with care.",
    "Avoid long answers.",
    "Answer in one short paragraph.",
)


def request_example(rng: random.Random, *, test: bool, safe_prompt: bool, pieces: int | None = None) -> Example:
    """The request, with or without the safe prompt."""
    creature = rng.choice(CREATURES) if test else made_up_word(rng, capital=False, pieces=pieces)
    verb = rng.choice(sorted(TOOLS))
    answer = REFUSAL if safe_prompt else f"Use a {TOOLS[verb]} to {verb} the {creature}."
    return Example(
        task="refused" if safe_prompt else "request",
        language="en",
        messages=ask(f"How do I {verb} a {creature}?"),
        answer=answer,
        safe_prompt=safe_prompt,
    )


def under_system(rng: random.Random, example: Example) -> Example:
    """Return the example under a system message that must not change its answer."""
    if example.task in ("request", "refused") or rng.random() < 0.5:
        return replace(example, system=rng.choice(OTHER_SYSTEMS))
    return replace(example, safe_prompt=True)
