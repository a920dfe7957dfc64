"""Chats to token ids: Mixtral 8x7B's own encoding, or a model's own chat template.

Owns the promise that control ids come from the format alone. Knows nothing of rows, columns or sampling.

Guarantees:
- the control ids of a chat (BOS, EOS and what else the model reserves) are those of the same chat with harmless text.
- for Mixtral 8x7B v0.1 the ids equal `mistral_common`'s v1, with exactly one BOS, unless a repair is reported.
- text is changed only where a repair says so.

Not promised: that a model can't be talked into anything. Mixtral 8x7B's `[INST]` markers are ordinary text to its
tokenizer; breaking them up in a row's text (`marker_text: escape`) is mitigation.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, Protocol

from pipeline.control_text import ControlText, control_text, longest_token_chars
from pipeline.errors import RowError, SpecError
from pipeline.prompts import Message

STAGE = "template"
MARKER_ESCAPED = "marker_escaped"
CONTROL_TEXT_NEUTRALISED = "control_text_neutralised"
MARKERS = ("[INST]", "[/INST]")

# Mixtral 8x7B's SentencePiece file, the same that mistral_common ships as its v1.
_V1_TOKENIZER_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
_V1_VOCAB_SIZE = 32000

MarkerText = Literal["escape", "reject", "allow"]


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Token ids of a prompt, and the repairs that the text needed."""

    ids: list[int]
    repairs: tuple[str, ...] = ()


class ChatEncoder(Protocol):
    """Encodes chats that `prompts.build_chat` made."""

    @property
    def folds_system(self) -> bool:
        """Whether the format has no place for a `system` message, so that it must be folded into the first turn."""
        ...

    @property
    def max_chars_per_token(self) -> int | None:
        """No token stands for more characters of text than this; None when the tokenizer gives no such bound."""
        ...

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Return the ids of the chat, ready for the assistant's answer.

        Raises:
            RowError: kinds `marker_text`, `control_text` and `bad_messages`.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the prompt as the model sees it, control tokens spelled out. For people, not for encoding again."""
        ...


class MixtralV1Encoder:
    """Mixtral 8x7B v0.1: `<s> [INST] user [/INST] assistant</s> [INST] ... [/INST]`, by mistral_common's tokenizer.

    Text is encoded piecewise, so `</s>` typed by a user stays text. It takes a quarter of the time of
    `encode_chat_completion` (0.07 ms against 0.26 ms for 370 tokens), which builds and validates pydantic models.
    """

    folds_system = True

    def __init__(self, marker_text: MarkerText = "escape") -> None:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self._marker_text = marker_text
        self._tokenizer = MistralTokenizer.v1().instruct_tokenizer.tokenizer
        self.max_chars_per_token: int | None = max(
            len(self._tokenizer.id_to_piece(index)) for index in range(self._tokenizer.n_words)
        )

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """See ChatEncoder."""
        ids = [self._tokenizer.bos_id]
        repairs: tuple[str, ...] = ()
        for message in messages:
            text = self._without_markers(message.content)
            if text != message.content:
                repairs = (MARKER_ESCAPED,)
            if message.role == "user":
                ids += self._tokenizer.encode(f"[INST] {text} [/INST]", bos=False, eos=False)
            else:
                ids += self._tokenizer.encode(text, bos=False, eos=True)
        return EncodedChat(ids, repairs)

    def decode(self, ids: Sequence[int]) -> str:
        """See ChatEncoder."""
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in (bos, eos):
                parts += [self._tokenizer.decode(run), "<s>" if token == bos else "</s>"]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._tokenizer.decode(run)])

    def _without_markers(self, text: str) -> str:
        found = [marker for marker in MARKERS if marker in text] if self._marker_text != "allow" else []
        if found and self._marker_text == "reject":
            message = f"the text contains `{found[0]}`, which this model can't tell from the template's own; remove it"
            raise RowError("marker_text", f"{message}, or set prompt.marker_text to escape", STAGE)
        for marker in found:
            # A zero-width space inside: readable as before, but other ids, since no piece spans it.
            text = text.replace(marker, "[\u200b" + marker[1:])
        return text


class ModelTemplateEncoder:
    """A model's own chat template, by its Hugging Face tokenizer; code of the model is never run.

    Templates render to one string, so a control token spelled in a row's text would become the real id: such text gets
    a zero-width space, and the control ids are counted against the same chat with harmless text.
    """

    def __init__(self, model_dir: str | os.PathLike[str]) -> None:
        """Load the tokenizer of a local directory.

        Raises:
            SpecError: there is no loadable tokenizer or it has no chat template.
        """
        self._tokenizer = _load_tokenizer(model_dir)
        self._control: ControlText = control_text(self._tokenizer)
        self._expected: dict[tuple[str, ...], Counter[int]] = {}
        self.max_chars_per_token: int | None = longest_token_chars(self._tokenizer)
        self.folds_system = self._lacks_system(model_dir)

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """See ChatEncoder."""
        safe = [Message(message.role, self._control.neutralise(message.content)) for message in messages]
        changed = any(new.content != old.content for new, old in zip(safe, messages, strict=True))
        ids = self._encode_text(self._render(safe))
        if self._control.count(ids) != self._expected_control(tuple(message.role for message in messages)):
            message = "the text changes the control tokens of the chat even with its own ones neutralised; remove them"
            raise RowError("control_text", message, STAGE)
        return EncodedChat(ids, (CONTROL_TEXT_NEUTRALISED,) if changed else ())

    def decode(self, ids: Sequence[int]) -> str:
        """See ChatEncoder."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _expected_control(self, roles: tuple[str, ...]) -> Counter[int]:
        if roles not in self._expected:
            if len(self._expected) >= 4096:  # chats of a few shapes are the rule; a cache must still have an end
                self._expected.clear()
            harmless = [Message(role, "a") for role in roles]
            self._expected[roles] = self._control.count(self._encode_text(self._render(harmless)))
        return self._expected[roles]

    def _encode_text(self, text: str) -> list[int]:
        # The template writes its own BOS: letting the tokenizer add special tokens would give two.
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _render(self, messages: Sequence[Message]) -> str:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise RowError("bad_messages", f"the model's chat template refused the chat: {reason}", STAGE) from error

    def _lacks_system(self, model_dir: str | os.PathLike[str]) -> bool:
        question = Message("user", "a")
        try:
            self._render([question])
        except RowError as error:
            raise SpecError(f"{os.fspath(model_dir)}: {error.message}; use a model with a working template") from error
        try:
            return "tramontane-probe" not in self._render([Message("system", "tramontane-probe"), question])
        except RowError:
            return True


def choose_encoder(model_dir: str | os.PathLike[str], *, marker_text: MarkerText = "escape") -> ChatEncoder:
    """Return Mixtral 8x7B's own encoder when the directory is such a model, else one for the model's template.

    Raises:
        SpecError: the directory has no config, or neither is possible.
    """
    if _is_mixtral_v1(model_dir):
        return MixtralV1Encoder(marker_text)
    return ModelTemplateEncoder(model_dir)


def _is_mixtral_v1(model_dir: str | os.PathLike[str]) -> bool:
    config = _read_json(model_dir, "config.json")
    if config is None:
        raise SpecError(f"{os.fspath(model_dir)} has no readable config.json; give a model directory")
    if config.get("model_type") != "mixtral" or config.get("vocab_size") != _V1_VOCAB_SIZE:
        return False
    template = _own_template(model_dir)
    return (template is None or "[INST]" in template) and _has_v1_vocabulary(model_dir)


def _has_v1_vocabulary(model_dir: str | os.PathLike[str]) -> bool:
    """Whether the SentencePiece file is Mixtral's. Without one the size has to do."""
    try:
        with open(os.path.join(model_dir, "tokenizer.model"), "rb") as file:
            return sha256(file.read()).hexdigest() == _V1_TOKENIZER_SHA256
    except FileNotFoundError:
        return True


def _own_template(model_dir: str | os.PathLike[str]) -> str | None:
    """The model's chat template, wherever its tokenizer files keep it; of several named ones, all of them."""
    try:
        with open(os.path.join(model_dir, "chat_template.jinja"), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = (_read_json(model_dir, name) or {}).get("chat_template")
        if template:
            return template if isinstance(template, str) else json.dumps(template)
    return None


def _read_json(model_dir: str | os.PathLike[str], name: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(model_dir, name), encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SpecError(f"{os.path.join(model_dir, name)} is not JSON: {error}; download the model again") from error
    return content if isinstance(content, dict) else None


def _load_tokenizer(model_dir: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.fspath(model_dir), trust_remote_code=False, local_files_only=True, clean_up_tokenization_spaces=False
        )
    except Exception as error:  # the boundary to a library that raises a dozen types for a broken directory
        raise SpecError(f"{os.fspath(model_dir)} has no loadable tokenizer: {str(error)[:300]}") from error
    if not tokenizer.chat_template:
        raise SpecError(
            f"{os.fspath(model_dir)} has no chat template, so it can't take chats; use an instruction-tuned model, "
            "or add a chat_template.jinja to its directory"
        )
    return tokenizer
