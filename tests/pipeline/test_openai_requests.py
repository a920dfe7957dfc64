"""A request of an OpenAI batch file: everything that its API takes is taken or refused, and nothing is passed over."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from pipeline.openai_requests import (
    CHAT,
    COMPLETIONS,
    BatchRequest,
    Refusal,
    read_request,
)
from pipeline.sampling import row_sampling
from pipeline.settings import SamplingSettings

MESSAGES = [{"role": "user", "content": "hello"}]


def read(url: str = CHAT, /, **body: Any) -> BatchRequest | Refusal:
    body = {"model": "gpt-4o", **({"messages": MESSAGES} if url == CHAT else {"prompt": "hello"}), **body}
    return read_request("a", "POST", url, json.dumps(body))


def taken(url: str = CHAT, /, **body: Any) -> BatchRequest:
    request = read(url, **body)
    assert isinstance(request, BatchRequest), request
    return request


def refused(url: str = CHAT, /, **body: Any) -> Refusal:
    request = read(url, **body)
    assert isinstance(request, Refusal), request
    return request


def sampling(url: str = CHAT, /, **body: Any) -> dict[str, Any]:
    """What a body changes in the job's sampling, once checked."""
    base = SamplingSettings()
    settings = row_sampling(base, taken(url, **body).sampling)
    return {name: value for name, value in settings.model_dump().items() if value != getattr(base, name)}


def test_a_plain_request_is_its_messages_under_the_jobs_sampling() -> None:
    assert taken() == BatchRequest(MESSAGES, None, None)
    assert taken(COMPLETIONS) == BatchRequest(None, "hello", None)


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        ({"max_tokens": 8}, {"max_tokens": 8}),
        ({"max_completion_tokens": 8}, {"max_tokens": 8}),
        ({"max_completion_tokens": 8, "max_tokens": 8}, {"max_tokens": 8}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.5, "n": 3, "seed": 5}, {"top_p": 0.5, "n": 3, "seed": 5}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1.0, "frequency_penalty": -1.0}),
        ({"top_k": -1, "min_p": 0.1}, {"min_p": 0.1}),
        ({"top_k": 5, "repetition_penalty": 1.1}, {"top_k": 5, "repetition_penalty": 1.1}),
        ({"min_tokens": 2, "ignore_eos": True}, {"min_tokens": 2, "ignore_eos": True}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            {"json_schema": {"type": "array"}},
        ),
    ],
    ids=str,
)
def test_sampling_of_the_body_is_the_rows(body: dict[str, Any], settings: dict[str, Any]) -> None:
    assert sampling(CHAT, **body) == settings
    assert sampling(COMPLETIONS, **body) == settings


@pytest.mark.parametrize(
    "body",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "safety_identifier": "x"},
        {"prompt_cache_key": "x", "parallel_tool_calls": True, "model": None},
        {"stream": False, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"temperature": None, "stop": None, "max_tokens": None, "tools": None, "reasoning_effort": None},
    ],
    ids=str,
)
def test_what_changes_no_answer_is_taken(body: dict[str, Any]) -> None:
    assert taken(CHAT, **body).sampling is None


@pytest.mark.parametrize(
    ("param", "value", "code"),
    [
        ("stream", True, "unsupported_parameter"),
        ("stream", 0, "unsupported_parameter"),
        ("tools", [{"type": "function"}], "unsupported_parameter"),
        ("tool_choice", "required", "unsupported_parameter"),
        ("functions", [{"name": "f"}], "unsupported_parameter"),
        ("logprobs", True, "unsupported_parameter"),
        ("top_logprobs", 3, "unsupported_parameter"),
        ("logit_bias", {"5": 1}, "unsupported_parameter"),
        ("modalities", ["text", "audio"], "unsupported_parameter"),
        ("reasoning_effort", "low", "unsupported_parameter"),
        ("response_format", {"type": "grammar"}, "unsupported_parameter"),
        ("response_format", {"type": "json_schema"}, "unsupported_parameter"),
        ("response_format", "json", "unsupported_parameter"),
        ("best_of", 4, "unsupported_parameter"),
        ("echo", True, "unsupported_parameter"),
        ("temprature", 0, "unknown_parameter"),
        ("messages", "hello", "invalid_type"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(param: str, value: Any, code: str) -> None:
    refusal = refused(CHAT, **{param: value})
    assert (refusal.kind, refusal.code, refusal.param) == ("unsupported_request", code, param)
    assert f"`{param}`" in refusal.message


def every_parameter(module: Any) -> set[str]:
    return {name for kind in typing.get_args(module.CompletionCreateParams) for name in typing.get_type_hints(kind)}


@pytest.mark.parametrize(("url", "module"), [(CHAT, chat_create_params), (COMPLETIONS, completion_create_params)])
def test_every_parameter_of_openais_client_is_known(url: str, module: Any) -> None:
    parameters = every_parameter(module)
    assert len(parameters) > 15
    codes = {name: getattr(read(url, **{name: "a value"}), "code", None) for name in parameters}
    assert [name for name, code in codes.items() if code == "unknown_parameter"] == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("text", "text"), (["text"], "text"), ("", ""), (None, "")],
)
def test_a_prompt_is_one_text(prompt: Any, expected: str) -> None:
    assert taken(COMPLETIONS, prompt=prompt).prompt == expected


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [[1]], [], {}, 5])
def test_several_prompts_and_token_ids_are_refused(prompt: Any) -> None:
    refusal = refused(COMPLETIONS, prompt=prompt)
    assert (refusal.kind, refusal.param) == ("unsupported_request", "prompt")


def test_messages_belong_to_chats_and_prompts_to_completions() -> None:
    assert refused(CHAT, prompt="x").param == "prompt"
    assert refused(COMPLETIONS, messages=MESSAGES).param == "messages"


def test_text_parts_become_one_text_and_that_is_reported() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = taken(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert request.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one\ntwo"}]
    assert request.repairs == ("joined_text_parts",)
    single = taken(messages=[{"role": "user", "content": parts[:1]}])
    assert (single.messages[0]["content"], single.repairs) == ("one", ())


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
        ({"role": "user", "content": ["text"]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[0].content"),
        ({"role": "tool", "content": "5", "tool_call_id": "x"}, "messages[0].role"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, "messages[0]"),
    ],
)
def test_parts_that_are_no_text_and_tools_are_refused(message: dict[str, Any], param: str) -> None:
    refusal = refused(messages=[message])
    assert (refusal.kind, refusal.code, refusal.param) == ("unsupported_request", "unsupported_value", param)


@pytest.mark.parametrize(
    ("line", "param", "code"),
    [
        ((None, "POST", CHAT, "{}"), "custom_id", "missing_required_parameter"),
        (("", "POST", CHAT, "{}"), "custom_id", "missing_required_parameter"),
        (("a", None, CHAT, "{}"), "method", "missing_required_parameter"),
        (("a", "GET", CHAT, "{}"), "method", "invalid_method"),
        (("a", "POST", None, "{}"), "url", "missing_required_parameter"),
        (("a", "POST", "/v1/embeddings", "{}"), "url", "invalid_url"),
        (("a", "POST", CHAT, None), "body", "missing_required_parameter"),
    ],
)
def test_a_line_that_is_no_request_is_a_bad_request(line: Any, param: str, code: str) -> None:
    refusal = read_request(*line)
    assert isinstance(refusal, Refusal)
    assert (refusal.kind, refusal.param, refusal.code) == ("bad_request", param, code)


def test_two_limits_that_differ_are_refused() -> None:
    assert refused(max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"
