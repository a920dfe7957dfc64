"""Rows become whole chats: what is repaired is named, what can't be is a failed row."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RowError
from pipeline.prompts import SAFE_PROMPT, Chat, Message, build_chat, row_messages, user_message
from pipeline.settings import Example, PromptSettings

SETTINGS = PromptSettings(messages="messages")


def chat_of(value: object, prompt: PromptSettings = SETTINGS, *, system: str | None = None, fold: bool = True) -> Chat:
    return build_chat(row_messages(value), prompt, system=system, fold_system=fold)


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def plain(chat: Chat) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in chat.messages]


def test_a_chat_in_order_is_left_alone() -> None:
    chat = chat_of(turns(("user", " a "), ("assistant", "b"), ("user", "c\n")))
    assert plain(chat) == [("user", " a "), ("assistant", "b"), ("user", "c\n")]
    assert chat.repairs == ()


def test_json_text_of_a_chat_equals_the_chat() -> None:
    value = turns(("system", "é"), ("user", "a"))
    assert chat_of(json.dumps(value)) == chat_of(value)


def test_system_is_folded_into_the_first_user_turn_with_a_blank_line() -> None:
    chat = chat_of(turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")))
    assert plain(chat) == [("user", "s\n\na"), ("assistant", "b"), ("user", "c")]
    assert chat.repairs == ("system_folded",)


def test_system_stays_a_message_for_models_that_have_one() -> None:
    chat = chat_of(turns(("system", "s"), ("user", "a")), system="spec", fold=False)
    assert plain(chat) == [("system", "spec\n\ns"), ("user", "a")]
    assert chat.repairs == ()


def test_a_late_system_message_moves_to_the_front() -> None:
    chat = chat_of(turns(("user", "a"), ("system", "s"), ("assistant", "b"), ("user", "c")))
    assert plain(chat) == [("user", "s\n\na"), ("assistant", "b"), ("user", "c")]
    assert chat.repairs == ("system_moved", "system_folded")


def test_an_empty_system_message_is_dropped() -> None:
    chat = chat_of(turns(("system", ""), ("user", "a")))
    assert plain(chat) == [("user", "a")]
    assert chat.repairs == ("empty_system_dropped",)


def test_neighbours_of_one_role_are_merged_with_a_blank_line() -> None:
    chat = chat_of(turns(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")))
    assert plain(chat) == [("user", "a\n\nb"), ("assistant", "c\n\nd"), ("user", "e")]
    assert chat.repairs == ("merged_user_turns", "merged_assistant_turns")


def test_examples_come_before_the_first_message_and_system_before_them() -> None:
    prompt = PromptSettings(messages="m", examples=[Example(user="q", assistant="r")], safe_prompt=True)
    chat = chat_of(turns(("system", "own"), ("user", "a")), prompt, system="spec")
    assert plain(chat) == [("user", f"{SAFE_PROMPT}\n\nspec\n\nown\n\nq"), ("assistant", "r"), ("user", "a")]


def test_the_specs_own_system_message_is_not_a_repair() -> None:
    assert chat_of(turns(("user", "a")), system="spec").repairs == ()


def test_safe_prompt_is_mistrals_text() -> None:
    text = (
        "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid harmful, "
        "unethical, prejudiced, or negative content. Ensure replies promote fairness and positivity."
    )
    chat = chat_of(turns(("user", "a")), PromptSettings(messages="m", safe_prompt=True))
    assert plain(chat) == [("user", f"{text}\n\na")]


BAD = [
    (None, "null_prompt", "null"),
    (3, "bad_messages", "type int"),
    ({"role": "user", "content": "a"}, "bad_messages", "type dict"),
    ([], "bad_messages", "empty"),
    ("", "empty_prompt", "empty text"),
    ("not json", "bad_messages", "not JSON"),
    ("[" * 100_000, "bad_messages", "nested too deep"),
    ("[" + "9" * 5000 + "]", "bad_messages", "not JSON"),
    ('"text"', "bad_messages", "type str"),
    ('{"role": "user"}', "bad_messages", "type dict"),
    ([None], "bad_messages", "message 0 is of type NoneType"),
    (["a"], "bad_messages", "message 0 is of type str"),
    ([{"content": "a"}], "bad_messages", "role 'None'"),
    (turns(("User", "a")), "bad_messages", "role 'User'"),
    (turns(("tool", "a")), "bad_messages", "allowed are system, user, assistant"),
    ([{"role": ["user"], "content": "a"}], "bad_messages", "role"),
    ([{"role": "user"}], "bad_messages", "no `content`"),
    ([{"role": "user", "content": None}], "bad_messages", "no `content`"),
    ([{"role": "user", "content": 5}], "bad_messages", "type int"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "bad_messages", "type list"),
    ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "bad_messages", "tool_calls"),
    (turns(("system", "a")), "bad_messages", "no user message"),
    (turns(("assistant", "a"), ("user", "b")), "bad_messages", "start with a user message"),
    (turns(("user", "a"), ("assistant", "b")), "bad_messages", "end with the user message"),
    (turns(("user", "")), "empty_prompt", "user message is empty"),
    (turns(("user", " \n\t")), "empty_prompt", "user message is empty"),
    (turns(("system", "s"), ("user", "")), "empty_prompt", "user message is empty"),
    (turns(("user", "a"), ("assistant", ""), ("user", "b")), "bad_messages", "assistant message is empty"),
    ('[{"role": "user", "content": "\\ud800"}]', "bad_messages", "half a surrogate pair"),
    ([{"role": "user", "content": "a"}] * 100_001, "bad_messages", "100001 messages"),
]


@pytest.mark.parametrize(("value", "kind", "words"), BAD, ids=[words for _, _, words in BAD])
def test_a_bad_chat_is_a_failed_row_that_says_why(value: object, kind: str, words: str) -> None:
    with pytest.raises(RowError) as caught:
        chat_of(value)
    assert (caught.value.kind, caught.value.stage) == (kind, "template")
    assert words in caught.value.message
    assert len(caught.value.message) < 500


def test_a_rendered_template_is_one_user_message() -> None:
    assert user_message("hi") == [Message("user", "hi")]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(st.characters(codec="utf-8"), max_size=8)),
        max_size=8,
    ),
    st.booleans(),
)
def test_every_chat_alternates_from_user_to_user_or_is_refused(pairs: list[tuple[str, str]], fold: bool) -> None:
    try:
        chat = chat_of(turns(*pairs), fold=fold)
    except RowError:
        return
    roles = [message.role for message in chat.messages]
    if roles[0] == "system":
        assert not fold
        roles = roles[1:]
    assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
    assert roles[-1] == "user"
    assert all(message.content for message in chat.messages)
    said = "".join(content for _, content in pairs)
    assert sorted(said.replace("\n", "")) == sorted("".join(m.content for m in chat.messages).replace("\n", ""))
