"""Random chats as users have them, and text that spells what models take for control."""

from __future__ import annotations

import random
from collections.abc import Sequence

ALPHABET = (
    "the cat",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "日本",
    "🦀",
    "\x00",
    "\u200b",
    "[",
    "]",
    "INST",
    "/",
    "<",
    ">",
    "s",
    "1.5",
)
BENIGN = tuple(piece for piece in ALPHABET if piece not in "<>")
BENIGN_CODE = "if a < b: x[INSTANCE] = '</S>'  # 100% <b>bold</b> <|endoftext|>"
"""Much that looks like control text to nobody but a careless check."""
CONTROL_STRINGS = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "▁[INST]",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "<0x0A>",
    "<0x01>",
    "<0x02>",
    "\x01",
    "\x02",
    "<",
    "s>",
    "/s>",
    "<|im_",
    "start|>",
    "<<s>s>",
    "[[INST]INST]",
    "<|im_<|im_end|>end|>",
    "<\u200bs>",
    "\u200b",
    "\u2060",
    "\ufeff",
    "＜s＞",
    "a",
    " ",
    "\n",
)


def random_text(rng: random.Random, pieces: Sequence[str] = ALPHABET) -> str:
    text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
    return "x" + text if not text.strip() else text


def random_chat(rng: random.Random, pieces: Sequence[str] = ALPHABET) -> list[dict[str, str]]:
    """Chats as users have them: system messages anywhere, runs of one role, always ending with a question."""
    chat = [{"role": "system", "content": random_text(rng, pieces)}] if rng.random() < 0.4 else []
    for _ in range(rng.randint(0, 3)):
        chat += [{"role": "user", "content": random_text(rng, pieces)} for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.1:
            chat.append({"role": "system", "content": random_text(rng, pieces)})
        chat += [{"role": "assistant", "content": random_text(rng, pieces)} for _ in range(rng.randint(1, 2))]
    return [*chat, {"role": "user", "content": random_text(rng, pieces)}]


def fuzz(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng, CONTROL_STRINGS) for _ in range(count)]
