"""Recognises models that speak Mixtral 8x7B v0.1's chat format, by what they do: their vocabulary and rendered chats.

A fine-tune may keep the vocabulary and `[INST]` and still differ by a line break, a system block or a stripped text; it
was trained on its own template, so it must get that one. Knows nothing of how chats are encoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from pipeline.chat_template import ChatTemplate
from pipeline.errors import RowError, SpecError
from pipeline.jinja_process import RenderLimits
from pipeline.prompts import Message, build_chat
from pipeline.settings import PromptSettings

# Mixtral 8x7B's SentencePiece file, the same that mistral_common ships as its v1.
_V1_TOKENIZER_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
_V1_VOCAB_SIZE = 32000

# Probes take a millisecond. More than the 2 s of a row, since a process that judged otherwise than its driver, because
# the machine was busy, would encode otherwise.
_LIMITS = RenderLimits(timeout_s=5.0)

# White space at the edges, which some templates strip; an answer begins with none, see `_without_turn_spaces`.
_QUESTIONS = (Message("user", " one\n"), Message("user", "two "), Message("user", "\n\nthree"))
_ANSWERS = (Message("assistant", "1.\n"), Message("assistant", "2. "))
_DIALOGUE = (_QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1], _ANSWERS[1], _QUESTIONS[2])
_SYSTEM = Message("system", " be brief\n")
PROBES = tuple(
    (*system, *_DIALOGUE[:turns])
    for system in ((), (_SYSTEM,))
    for turns in (1, 3, 5)  # up to a question each
)


def is_mixtral_v1(model_dir: str | os.PathLike[str]) -> bool:
    """Whether the directory's model has Mixtral 8x7B v0.1's vocabulary, and its chat template (if any) writes v1 chats.

    Raises:
        SpecError: the directory has no readable config.
    """
    config = _read_json(model_dir, "config.json")
    if config is None:
        raise SpecError(f"{os.fspath(model_dir)} has no readable config.json; give a model directory")
    if config.get("model_type") != "mixtral" or config.get("vocab_size") != _V1_VOCAB_SIZE:
        return False
    template = _default_template(model_dir)
    writes_v1 = template is None or template_writes_v1(template, _special_tokens(model_dir))
    return writes_v1 and _has_v1_vocabulary(model_dir)


def template_writes_v1(template: str, special_tokens: dict[str, Any], *, limits: RenderLimits = _LIMITS) -> bool:
    """Whether a chat template renders probe chats as v1 has them; one that passes the limits on a probe doesn't.

    Two differences don't count. A refusal of `system` messages: they are then folded, which is a reported repair. And
    the space with which a turn begins: v1's tokenizer encodes turn by turn and puts one before each whether or not the
    template writes it, as Mistral's second template does and its first did not.
    """
    # Dates, `tojson` for tools and `{% generation %}` are missing: what needs them gets its own template either way.
    with ChatTemplate(template, special_tokens, dialect="plain", limits=limits) as chat:
        return all(_writes_v1(chat, probe) for probe in PROBES)


def _writes_v1(chat: ChatTemplate, probe: Sequence[Message]) -> bool:
    try:
        text = chat.render(probe)
    except RowError as error:
        return error.kind == "template_error" and probe[0].role == "system"
    return _without_turn_spaces(text) == _without_turn_spaces(v1_text(probe))


def v1_text(messages: Sequence[Message]) -> str:
    """What v1 makes of a chat, with BOS, EOS and each turn's leading space spelled out; `system` folded as by us."""
    folded = build_chat(list(messages), PromptSettings(messages="any"), system=None, fold_system=True).messages
    turns = [
        f" [INST] {message.content} [/INST]" if message.role == "user" else f" {message.content}</s>"
        for message in folded
    ]
    return "".join(["<s>", *turns])


def _without_turn_spaces(text: str) -> str:
    return re.sub(r"(<s>|</s>|\[/INST\]) (?=\S)", r"\1", text)


def _has_v1_vocabulary(model_dir: str | os.PathLike[str]) -> bool:
    """Whether the tokenizer's pieces are Mixtral's. With no tokenizer at all the size has to do."""
    try:
        with open(os.path.join(model_dir, "tokenizer.model"), "rb") as file:
            return sha256(file.read()).hexdigest() == _V1_TOKENIZER_SHA256
    except FileNotFoundError:
        pass
    tokenizer = _read_json(model_dir, "tokenizer.json")
    return tokenizer is None or tokenizer.get("model", {}).get("vocab") == _v1_vocabulary()


def _v1_vocabulary() -> dict[str, int]:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    return {tokenizer.id_to_piece(index): index for index in range(tokenizer.n_words)}


def _default_template(model_dir: str | os.PathLike[str]) -> str | None:
    """The model's chat template, wherever its tokenizer files keep it; of several named ones, the default."""
    try:
        with open(os.path.join(model_dir, "chat_template.jinja"), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = (_read_json(model_dir, name) or {}).get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template:
            return str(template)
    return None


def _special_tokens(model_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The tokens that templates may name, Mixtral's own unless the tokenizer's files say otherwise."""
    tokens: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        given = _read_json(model_dir, name) or {}
        tokens |= {token: given[token] for token in tokens if token in given}
    return {token: value["content"] if isinstance(value, dict) else value for token, value in tokens.items()}


def _read_json(model_dir: str | os.PathLike[str], name: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(model_dir, name), encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SpecError(f"{os.path.join(model_dir, name)} is not JSON: {error}; download the model again") from error
    return content if isinstance(content, dict) else None
