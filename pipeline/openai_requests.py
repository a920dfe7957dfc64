"""A line of an OpenAI batch file as what the pipeline does with it: a chat or a prompt, and the row's own sampling.

Pure. Knows what OpenAI's API calls things, and nothing of files or engines. Invariant: nothing that would change the
answer is passed over: what isn't supported is a refusal that names it.

- `model` is not looked at: the run's model answers, and the response says which one that was.
- What a request leaves open (or gives as null) comes from the spec's `sampling`.
- Of several text parts of a message one text is made, joined by line breaks; the repair is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS)
COLUMNS = ("custom_id", "method", "url", "body")
"""What a line of a batch file holds; each is a column of text, `body` as JSON."""
LINE = "line"
"""Column with the line's number in its file, from 1."""
KEPT_OF_REQUESTS = ("custom_id", "method", "url", LINE)
"""Columns of every output of such a run: what OpenAI's form of a result needs."""

BAD_REQUEST, UNSUPPORTED = "bad_request", "unsupported_request"
PARTS_JOINED = "joined_text_parts"

# Bookkeeping and hints of cost or speed: no answer depends on them.
_WITHOUT_EFFECT = frozenset(
    {
        *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    }
)
# The values that ask for nothing beyond plain text; any other is refused.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
# OpenAI's and, from `top_k` on, what vLLM's server takes besides: the names are those of `sampling`.
_SAMPLING = (
    *("n", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"),
)
_OTHERS = frozenset({"messages", "prompt", "stop", "max_tokens", "max_completion_tokens", "response_format"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a line is no request that can be answered; `code` and `param` are in OpenAI's words."""

    kind: str
    """The row's `error.kind`."""
    code: str
    param: str | None
    message: str


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a line asks for: a chat, or a prompt that is continued as it is."""

    messages: Any
    """As `prompts.row_messages` takes them; None for a completion."""
    prompt: str | None
    """None for a chat."""
    sampling: str | None
    """The row's own settings as `sampling.row_sampling` takes them; None for those of the job."""
    repairs: tuple[str, ...] = ()


class _Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def read_request(
    custom_id: str | None, method: str | None, url: str | None, body: str | None
) -> BatchRequest | Refusal:
    """Read a line's columns; null is what the line lacks, or what isn't of the type it must be of."""
    try:
        _check_envelope(custom_id, method, url)
        data = json.loads(body) if body is not None else None
        if not isinstance(data, dict):
            raise _bad("missing_required_parameter", "body", "`body` is missing or not an object")
        return _read_body(data, is_chat=url == CHAT)
    except _Refused as refused:
        return refused.refusal
    except RecursionError:
        return Refusal(BAD_REQUEST, "invalid_value", "body", "`body` is nested too deeply")


def envelope_refusal(custom_id: str | None, method: str | None, url: str | None) -> Refusal | None:
    """What is wrong with a line around its body, None when nothing is."""
    try:
        _check_envelope(custom_id, method, url)
    except _Refused as refused:
        return refused.refusal
    return None


def _check_envelope(custom_id: str | None, method: str | None, url: str | None) -> None:
    if not custom_id:
        raise _bad("missing_required_parameter", "custom_id", "`custom_id` is missing, empty or not a text")
    if method is None:
        raise _bad("missing_required_parameter", "method", '`method` is missing or not a text; write "POST"')
    if method != "POST":
        raise _bad("invalid_method", "method", f'`method` is {_shown(method)}; only "POST" is supported')
    if url is None:
        raise _bad("missing_required_parameter", "url", f"`url` is missing or not a text; write {_any_of(URLS)}")
    if url not in URLS:
        raise _bad("invalid_url", "url", f"`url` is {_shown(url)}; supported are {_any_of(URLS)}")


def _read_body(body: Mapping[str, Any], *, is_chat: bool) -> BatchRequest:
    given = {name: value for name, value in body.items() if value is not None}
    _check_supported(given)
    other = "prompt" if is_chat else "messages"
    if other in given:
        url = CHAT if is_chat else COMPLETIONS
        raise _unsupported("unknown_parameter", other, f"`{other}` is no parameter of {url}; remove it")
    own = _sampling(given)
    sampling = json.dumps(own) if own else None
    if not is_chat:
        return BatchRequest(None, _prompt(given.get("prompt")), sampling)
    messages, repairs = _messages(given.get("messages"))
    return BatchRequest(messages, None, sampling, repairs)


def _check_supported(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _ASKS_NOTHING:
            # `in` would take `false` for 0, and the other way round.
            if not any(value == each and type(value) is type(each) for each in _ASKS_NOTHING[name]):
                raise _unsupported("unsupported_parameter", name, f"`{name}`: {_shown(value)} isn't supported here")
        elif name not in _WITHOUT_EFFECT and name not in _SAMPLING and name not in _OTHERS:
            raise _unsupported("unknown_parameter", name[:80], f"`{name[:80]}` is no parameter known here; remove it")


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: given[name] for name in _SAMPLING if name in given}
    if settings.get("top_k") == -1:  # vLLM's word for all
        settings["top_k"] = 0
    limits = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    if limits:
        if limits[0] != limits[-1]:
            reason = "`max_completion_tokens` and `max_tokens` say different things; give one"
            raise _unsupported("invalid_value", "max_completion_tokens", reason)
        settings["max_tokens"] = limits[0]
    if "stop" in given:
        settings["stop"] = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
    return settings | _response_format(given.get("response_format"))


def _response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind in (None, "text"):
        return {}
    if kind == "json_object":
        return {"json_object": True}
    inner = value.get("json_schema") if kind == "json_schema" else None
    if isinstance(inner, dict) and isinstance(inner.get("schema"), dict):
        return {"json_schema": inner["schema"]}
    message = f"`response_format`: {_shown(value)} isn't supported; give text, json_object or a json_schema"
    raise _unsupported("unsupported_parameter", "response_format", message)


def _prompt(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if value is None or isinstance(value, str):
        return value or ""
    reason = "`prompt` must be one text; several prompts and token ids aren't supported: write a line for each text"
    raise _unsupported("invalid_value", "prompt", reason)


def _messages(value: Any) -> tuple[Any, tuple[str, ...]]:
    if value is None:
        return None, ()
    if not isinstance(value, list):
        raise _unsupported("invalid_type", "messages", f"`messages` is {_shown(value)}; give a list of messages")
    read = [_message(number, message) for number, message in enumerate(value)]
    joined = any(was_joined for _, was_joined in read)
    return [message for message, _ in read], (PARTS_JOINED,) if joined else ()


def _message(number: int, message: Any) -> tuple[Any, bool]:
    """The message with its content as one text, and whether that took joining parts."""
    if not isinstance(message, dict):
        return message, False
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function"):
        reason = f"message {number} has role {_shown(role)}: tools aren't supported; put their results into the text"
        raise _unsupported("unsupported_value", f"messages[{number}].role", reason)
    if message.get("tool_calls") or message.get("function_call"):
        raise _unsupported("unsupported_value", f"messages[{number}]", f"message {number} calls tools: not supported")
    if role == "developer":  # what OpenAI's newer models call it
        message = {**message, "role": "system"}
    if not isinstance(content, list):
        return message, False
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        reason = f"message {number} has a part that is no text; only text is supported"
        raise _unsupported("unsupported_value", f"messages[{number}].content", reason)
    return {**message, "content": "\n".join(map(str, texts))}, len(texts) > 1


def _bad(code: str, param: str, message: str) -> _Refused:
    return _Refused(Refusal(BAD_REQUEST, code, param, message))


def _unsupported(code: str, param: str, message: str) -> _Refused:
    return _Refused(Refusal(UNSUPPORTED, code, param, message))


def _any_of(values: tuple[str, ...]) -> str:
    return " or ".join(f'"{value}"' for value in values)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
