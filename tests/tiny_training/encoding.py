"""Examples to token ids, by the pipeline's own chat building and encoding, with the assistant's tokens marked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pipeline.chat_encoder import MixtralV1Encoder
from pipeline.prompts import Message, build_chat
from pipeline.settings import PromptSettings
from tests.tiny_training.examples import Example


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of prompt and answer; `targets` are the places of the assistant's tokens, each turn's EOS included."""

    task: str
    ids: list[int]
    targets: list[int]


@cache
def _encoder() -> MixtralV1Encoder:
    return MixtralV1Encoder()


def chat_of(example: Example) -> tuple[Message, ...]:
    """The example's messages as the pipeline completes them: safe prompt and system message folded in."""
    settings = PromptSettings(messages="messages", safe_prompt=example.safe_prompt)
    return build_chat(list(example.messages), settings, system=example.system, fold_system=True).messages


def prompt_ids(example: Example) -> list[int]:
    """Ids of the prompt alone."""
    return _encoder().encode(chat_of(example)).ids


def encode(example: Example) -> Encoded:
    """Ids of the whole conversation."""
    ids: list[int] = []
    targets: list[int] = []
    for message in (*chat_of(example), Message("assistant", example.answer)):
        new = _encoder().encode([message]).ids[1:]  # each message's ids are its own; BOS comes once
        if message.role == "assistant":
            targets += range(len(ids) + 1, len(ids) + 1 + len(new))
        ids += new
    return Encoded(example.task, [_encoder().encode([]).ids[0], *ids], targets)
