"""Whether a file of the batch API is one: its lines that are no requests, as OpenAI's API lists them.

What a request asks for is not looked at here: a request that can't be answered fails alone, when its turn comes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from openai.types import BatchError

from pipeline import jsonl
from pipeline.openai_requests import envelope_refusal

MAX_ERRORS = 100
"""Told of one file; nobody mends more at once."""
_ALL_ROWS = 2**62


def check_requests(path: str, *, endpoint: str, model: str) -> tuple[int, list[BatchError]]:
    """Number of requests in the file, and what is wrong with its first lines that are none; reads it once."""
    num_requests, errors = 0, []
    seen: set[bytes] = set()
    for line in jsonl.read_lines(path, jsonl.Marks(), 0, _ALL_ROWS):
        num_requests += 1
        error = _line_error(line, endpoint, model) or _repetition(line, seen)
        if error is not None:
            errors.append(error)
        if len(errors) == MAX_ERRORS:
            break
    if not num_requests:
        errors.append(BatchError(code="empty_file", message="the file has no requests; give one a line"))
    return num_requests, errors


def input_ids(path: str) -> Iterator[str]:
    """The `custom_id` of each request of a file that has been checked, in its order."""
    for line in jsonl.read_lines(path, jsonl.Marks(), 0, _ALL_ROWS):
        yield str((line.record or {})["custom_id"])


def _line_error(line: jsonl.Line, endpoint: str, model: str) -> BatchError | None:
    if line.record is None:
        return _error(line, "invalid_json_line", None, line.error or "")
    custom_id, method, url = (_text(line.record.get(name)) for name in ("custom_id", "method", "url"))
    if (refusal := envelope_refusal(custom_id, method, url)) is not None:
        return _error(line, refusal.code, refusal.param, refusal.message)
    if url != endpoint:
        return _error(line, "invalid_url", "url", f"`url` is {url}, but the batch was created for {endpoint}")
    body = line.record.get("body")
    if not isinstance(body, dict):
        return _error(line, "missing_required_parameter", "body", "`body` is missing or not an object")
    if body.get("model") != model:
        named = json.dumps(body.get("model"))[:100]
        return _error(line, "model_not_found", "body.model", f"there is no model {named} here; there is {model!r}")
    return None


def _repetition(line: jsonl.Line, seen: set[bytes]) -> BatchError | None:
    custom_id = str((line.record or {})["custom_id"])
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    if digest in seen:
        message = f"an earlier line has the custom_id {custom_id!r:.80}; make it unique"
        return _error(line, "duplicate_custom_id", "custom_id", message)
    seen.add(digest)
    return None


def _error(line: jsonl.Line, code: str, param: str | None, message: str) -> BatchError:
    return BatchError(code=code, line=line.number, message=message, param=param)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
