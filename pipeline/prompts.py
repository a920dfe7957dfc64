"""A row's chat, made whole: checked, completed with the spec's messages, and brought into the order models expect.

Pure. Knows nothing of tokens or templates. The invariant: what comes out is one optional `system` message, then `user`
and `assistant` by turns, beginning and ending with `user`, no content empty.

Guarantees:
- `system` text goes to the front: the safe prompt, the spec's, then the row's, joined by blank lines.
- neighbours of one role become one message, joined by a blank line.
- whatever was changed about the row's own messages is named in `repairs`; nothing else is changed.
- few-shot examples come before the row's first message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RowError
from pipeline.settings import Example, PromptSettings

STAGE = "template"
# Mistral's own text, what `safe_prompt: true` means in its API.
SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. "
    "Avoid harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and positivity."
)
ROLES = ("system", "user", "assistant")
# Each message costs at least four tokens: no context of today holds so many, and a longer list is a broken row.
MAX_MESSAGES = 100_000

SYSTEM_FOLDED = "system_folded"
SYSTEM_MOVED = "system_moved"
EMPTY_SYSTEM_DROPPED = "empty_system_dropped"
MERGED = {"user": "merged_user_turns", "assistant": "merged_assistant_turns"}

_JOIN = "\n\n"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat ready to be encoded, and the names of the repairs made to the row's messages, in order, each once."""

    messages: tuple[Message, ...]
    repairs: tuple[str, ...]


def row_messages(value: object) -> list[Message]:
    """Read a `messages` value: a list of {role, content}, or that as JSON text. Other keys are ignored.

    Raises:
        RowError: kind `null_prompt`, or `bad_messages` naming the message and the rule.
    """
    if value is None:
        raise RowError("null_prompt", "the messages are null; give a list of {role, content}", STAGE)
    if isinstance(value, str):
        value = _from_json(value)
    if not isinstance(value, list):
        raise _bad(f"the messages are of type {type(value).__name__}; give a list of {{role, content}}, or JSON of one")
    if not value:
        raise _bad("the list of messages is empty; give at least one from the user")
    if len(value) > MAX_MESSAGES:
        raise _bad(f"{len(value)} messages are more than the {MAX_MESSAGES} allowed; shorten the chat")
    return [_message(number, item) for number, item in enumerate(value)]


def user_message(text: str) -> list[Message]:
    """Return a rendered template as the chat that it is."""
    return [Message("user", encodable(text, "the rendered prompt"))]


def build_chat(messages: Sequence[Message], settings: PromptSettings, *, system: str | None, fold_system: bool) -> Chat:
    """Complete and order one row's messages.

    `system` is the spec's system message, already rendered. With `fold_system` system text goes into the first user
    message, for models whose template has no place for it.

    Raises:
        RowError: kind `bad_messages` when roles are out of order, `empty_prompt` when the user says nothing.
    """
    repairs: list[str] = []
    own_system = _own_system(messages, repairs)
    turns = _merge([message for message in messages if message.role != "system"], repairs)
    _check_turns(turns)
    turns = [*_example_turns(settings.examples), *turns]
    if own_system and fold_system:
        repairs.append(SYSTEM_FOLDED)
    parts = [SAFE_PROMPT if settings.safe_prompt else "", encodable(system or "", "the system message"), *own_system]
    return Chat(_with_system(_JOIN.join(part for part in parts if part), turns, fold=fold_system), tuple(repairs))


def _own_system(messages: Sequence[Message], repairs: list[str]) -> list[str]:
    places = [place for place, message in enumerate(messages) if message.role == "system"]
    texts = [messages[place].content for place in places]
    if "" in texts:
        repairs.append(EMPTY_SYSTEM_DROPPED)
    if places != list(range(len(places))):
        repairs.append(SYSTEM_MOVED)
    return [text for text in texts if text]


def _merge(messages: Iterable[Message], repairs: list[str]) -> list[Message]:
    groups: list[tuple[str, list[str]]] = []
    for message in messages:
        if groups and groups[-1][0] == message.role:
            groups[-1][1].append(message.content)
        else:
            groups.append((message.role, [message.content]))
    for role, texts in groups:
        if len(texts) > 1 and MERGED[role] not in repairs:
            repairs.append(MERGED[role])
    return [Message(role, _JOIN.join(text for text in texts if text)) for role, texts in groups]


def _check_turns(turns: Sequence[Message]) -> None:
    if not turns:
        raise _bad("there is no user message; the last message must be from the user")
    if turns[0].role != "user":
        raise _bad("the first message after `system` is from the assistant; start with a user message")
    if turns[-1].role != "user":
        raise _bad("the last message is from the assistant; end with the user message to be answered")
    for turn in turns:
        if turn.content.strip():
            continue
        if turn.role == "user":
            raise RowError("empty_prompt", "a user message is empty; remove the row or fill it", STAGE)
        raise _bad("an assistant message is empty; remove it, with the user message that it answers")


def _example_turns(examples: Sequence[Example]) -> list[Message]:
    pairs = [(Message("user", example.user), Message("assistant", example.assistant)) for example in examples]
    return [message for pair in pairs for message in pair]


def _with_system(text: str, turns: Sequence[Message], *, fold: bool) -> tuple[Message, ...]:
    if not text:
        return tuple(turns)
    if fold:
        return (Message("user", text + _JOIN + turns[0].content), *turns[1:])
    return (Message("system", text), *turns)


def _from_json(text: str) -> object:
    if not text.strip():
        raise RowError("empty_prompt", "the messages are an empty text; give JSON of a list of {role, content}", STAGE)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise _bad(f"the messages are text but not JSON: {reason}; give JSON of a list of {{role, content}}") from None


def _message(number: int, item: Any) -> Message:
    if not isinstance(item, dict):
        raise _bad(f"message {number} is of type {type(item).__name__}; give an object with `role` and `content`")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise _bad(f"message {number} has role {str(role)[:40]!r}; allowed are {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise _bad(f"message {number} has `tool_calls`, which are not supported; put them into the text")
    if content is None:
        raise _bad(f"message {number} has no `content`; give a text")
    if not isinstance(content, str):
        raise _bad(f"message {number} has `content` of type {type(content).__name__}; give one text")
    return Message(role, encodable(content, f"message {number}"))


def encodable(text: str, what: str) -> str:
    """Return `text` if it can be encoded: half of a surrogate pair, which JSON can spell, crashes tokenizers.

    Raises:
        RowError: kind `bad_messages`.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad(f"{what} has half a surrogate pair at character {error.start}; write valid Unicode") from None
    return text


def _bad(message: str) -> RowError:
    return RowError("bad_messages", message, STAGE)
