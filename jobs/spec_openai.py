"""`input.format: openai_batch` in a spec: what it stands for, and its rules. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.yaml_source import FieldPath, Problem

OPENAI_BATCH = "openai_batch"
_ALLOWED_IN_PROMPT = "marker_text"


def expand_openai_batch(data: dict[str, Any]) -> None:
    """Fill in the prompt of a job over a batch file: each request brings its own. A misspelt format counts as one."""
    prompt, limits = data.get("prompt") or {}, data.get("limits") or {}
    if _names(data, "input").get("format") in (None, "auto"):
        return
    if isinstance(prompt, dict) and prompt.get("messages") is None and prompt.get("template") is None:
        data["prompt"] = {**prompt, "messages": "body"}
    if isinstance(limits, dict):
        # In OpenAI's batches one request's failure is no other's business.
        data["limits"] = {"max_failed_fraction": 1.0, **limits}


def check_openai_batch(given: Mapping[str, Any]) -> Iterator[Problem]:
    """Broken rules of a spec, as written, over a batch file."""
    if not _is_openai_batch(given):
        return
    if given.get("kind") not in (None, "complete"):
        message = f"`input.format` is {OPENAI_BATCH}, whose requests say themselves what to do"
        yield Problem(("kind",), message, hint="leave `kind` out")
    idle: list[tuple[FieldPath, str]] = [
        *((("prompt", name), "each request brings its own prompt") for name in _names(given, "prompt")),
        (("sampling", "column"), "each request brings its own sampling"),
        (("input", "id"), "`custom_id` is the id"),
        (("input", "prefix"), "no run writes such files"),
        (("input", "new"), "a batch file is done as a whole"),
    ]
    for path, reason in idle:
        section, name = str(path[0]), str(path[1])
        if _names(given, section).get(name) not in (None, "all") and name != _ALLOWED_IN_PROMPT:
            message = f"`{section}.{name}` says nothing with `input.format: {OPENAI_BATCH}`: {reason}"
            yield Problem(path, message, hint="leave it out", on_key=True)


def _is_openai_batch(data: Mapping[str, Any]) -> bool:
    return _names(data, "input").get("format") == OPENAI_BATCH


def _names(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    value = data.get(section)
    return value if isinstance(value, dict) else {}
