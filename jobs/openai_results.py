"""A row's output as a line of OpenAI's batch output: an answer for `output.jsonl`, or a failure for `error.jsonl`.

Pure; the shapes are those that `openai`'s types ChatCompletion, Completion, ErrorObject and BatchError read. Invariant:
the same run gives the same lines, ids included, whenever it is exported.

- Answered: `response.status_code` 200, with one choice for each sample.
- Refused or failed: 400 or 500 and OpenAI's error object in `response.body`, as its server answers such a request.
- No request at all (broken JSON, no or a repeated custom_id, wrong method or url): no response, but an `error` with the
  number of the line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.openai_requests import (
    BAD_REQUEST,
    COMPLETIONS,
    LINE,
    UNSUPPORTED,
    Refusal,
    envelope_refusal,
    read_request,
)

REFINED_KINDS = frozenset({BAD_REQUEST, UNSUPPORTED})
"""Of failures whose code and parameter are read from the request itself."""

_INVALID_VALUE = "invalid_value"
# Kinds of errors that are the request's: everything else is the server's.
_CODES = {
    "null_prompt": "missing_required_parameter",
    "empty_prompt": _INVALID_VALUE,
    "bad_messages": _INVALID_VALUE,
    "bad_sampling": _INVALID_VALUE,
    "prompt_too_long": "context_length_exceeded",
    "marker_text": "invalid_prompt",
    "control_text": "invalid_prompt",
    "request_refused": "invalid_request",
    UNSUPPORTED: "unsupported_parameter",
}
_WITHOUT_PARAM = ("bad_sampling", "request_refused", UNSUPPORTED)
# What makes a line no request at all, with the parameter to blame; that of a bad request is in its columns, if not
# in its body.
_LINE_CODES = {
    "bad_row": ("invalid_json_line", None),
    "duplicate_custom_id": ("duplicate_custom_id", "custom_id"),
    BAD_REQUEST: ("missing_required_parameter", "body"),
}


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What all lines of an export share."""

    model: str
    """Which model answered, whatever requests named."""
    created: int
    """When the run began, in seconds since the epoch."""
    fingerprint: str
    is_batch: bool
    """Whether the input was a batch file."""


@dataclass(frozen=True, slots=True)
class ResultLine:
    """One line, and which of the two files it belongs to."""

    is_error: bool
    value: dict[str, Any]


def result_line(samples: Sequence[Mapping[str, Any]], custom_id: str | None, facts: RunFacts) -> ResultLine:
    """The line of one input row; `samples` are its output rows, in order.

    A sample whose output failed validation is no choice; a row with no other is an error.
    """
    first = samples[0]
    good = [sample for sample in samples if sample["status"] in ("ok", "truncated")]
    identity = f"{facts.fingerprint}\0{first['input_row']}\0{first['input_file']}"
    key = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    response, error = None, None
    if good:
        response = _response(200, key, _completion(good, samples, key, facts))
    elif first["error"]["kind"] in _LINE_CODES:
        error = _line_error(first, facts)
    else:
        status_code, reason = _error_object(first)
        response = _response(status_code, key, {"error": reason})
    value = {"id": f"batch_req_{key}", "custom_id": custom_id, "response": response, "error": error}
    return ResultLine(is_error=not good, value=value)


def _response(status_code: int, key: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status_code, "request_id": f"req_{key}", "body": body}


def _completion(
    good: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]], key: str, facts: RunFacts
) -> dict[str, Any]:
    is_raw = good[0].get("url") == COMPLETIONS
    return {
        "id": f"{'cmpl' if is_raw else 'chatcmpl'}-{key}",
        "object": "text_completion" if is_raw else "chat.completion",
        "created": facts.created,
        "model": facts.model,
        "choices": [_choice(sample, is_raw=is_raw) for sample in good],
        "usage": _usage(samples),
        "system_fingerprint": f"fp_{facts.fingerprint[:12]}",
    }


def _choice(sample: Mapping[str, Any], *, is_raw: bool) -> dict[str, Any]:
    text = sample["generated_text"]
    said = {"text": text} if is_raw else {"message": {"role": "assistant", "content": text, "refusal": None}}
    return {"index": sample["sample_index"], **said, "logprobs": None, "finish_reason": sample["finish_reason"]}


def _usage(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every sample's tokens count, valid or not; the prompt's count once."""
    prompt = samples[0]["num_input_tokens"] or 0
    generated = sum(sample["num_generated_tokens"] or 0 for sample in samples)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": samples[0]["num_cached_tokens"] or 0},
    }


def _line_error(row: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """What is wrong with a line that is no request, as BatchError has it."""
    kind = row["error"]["kind"]
    code, param = _LINE_CODES[kind] if facts.is_batch else (kind, None)
    if kind == BAD_REQUEST and (refusal := _refusal(row)) is not None:
        code, param = refusal.code, refusal.param
    return {"code": code, "message": row["error"]["message"], "param": param, "line": row.get(LINE)}


def _error_object(row: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status code and ErrorObject of a request that was refused or failed."""
    kind, message = row["error"]["kind"], row["error"]["message"]
    if kind not in _CODES:
        return 500, {"message": message, "type": "server_error", "param": None, "code": kind}
    prompt = "prompt" if row.get("url") == COMPLETIONS else "messages"
    code, param = _CODES[kind], None if kind in _WITHOUT_PARAM else prompt
    if kind == UNSUPPORTED and (refusal := _refusal(row)) is not None:
        code, param = refusal.code, refusal.param
    return 400, {"message": message, "type": "invalid_request_error", "param": param, "code": code}


def _refusal(row: Mapping[str, Any]) -> Refusal | None:
    """What was wrong with a request, in OpenAI's words; None if that was in a body that the output doesn't carry."""
    line = (row["custom_id"], row["method"], row["url"])
    if "body" not in row:
        return envelope_refusal(*line)
    found = read_request(*line, row["body"])
    return found if isinstance(found, Refusal) else None
