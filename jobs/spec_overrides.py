"""`--set path=value` laid over a spec's data, before anything is validated.

Values are YAML. Knows which paths exist, so that a typo is answered with what was meant; whether a value fits is
decided later, by the same validation as for the file.
"""

from __future__ import annotations

import re
from typing import Any

from jobs.spec_fields import FieldNode, find_field, format_path
from jobs.spec_messages import unknown_field
from jobs.yaml_source import Document, FieldPath, Problem, parse_yaml

_STEP = re.compile(r"\.?([A-Za-z_][\w-]*)|\.(\d{1,6})|\[(\d{1,6})\]")


class _WrongOverrideError(Exception):
    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint


def apply_overrides(document: Document, overrides: list[str]) -> dict[FieldPath, str]:
    """Change `document.data` in place; return {path: text} of those that could be applied.

    What can't be applied is added to `document.problems`. Later ones win.
    """
    applied: dict[FieldPath, str] = {}
    for text in overrides:
        try:
            path, value = _parse(text)
            if unknown := _first_unknown(path):
                problem = unknown_field(unknown)
                raise _WrongOverrideError(problem.message, problem.hint)
            _place(document, path, value)
        except _WrongOverrideError as wrong:
            document.problems.append(Problem(("--set", text), wrong.message, hint=wrong.hint, override=text))
        else:
            applied.pop(path, None)
            applied[path] = text
    return applied


def _parse(text: str) -> tuple[FieldPath, Any]:
    dotted, separator, written = text.partition("=")
    if not separator:
        raise _WrongOverrideError("no `=`", "write --set PATH=VALUE, e.g. --set sampling.temperature=0")
    path = _parse_path(dotted.strip())
    value = parse_yaml(written, name="--set")
    if value.problems:
        problem = value.problems[0]
        raise _WrongOverrideError(problem.message, problem.hint)
    return path, value.data


def _parse_path(dotted: str) -> FieldPath:
    path: list[str | int] = []
    position = 0
    while position < len(dotted):
        found = _STEP.match(dotted, position)
        if found is None:
            break
        path.append(found.group(1) or int(found.group(2) or found.group(3)))
        position = found.end()
    if not path or position < len(dotted):
        raise _WrongOverrideError(
            f"`{dotted}` is not a path", "write names joined by dots, e.g. fleet.pools[0].replicas"
        )
    return tuple(path)


def _first_unknown(path: FieldPath) -> FieldPath | None:
    """The shortest part of the path that no field answers to."""
    for length in range(1, len(path) + 1):
        if find_field(path[:length]) is None:
            return path[:length]
    return None


def _place(document: Document, path: FieldPath, value: Any) -> None:
    if document.data is None:
        document.data = {}
    owner = document.data
    for length, step in enumerate(path[:-1], start=1):
        _check_step(owner, step, path[:length])
        if isinstance(owner, dict) and owner.get(step) is None:
            owner[step] = _empty(find_field(path[:length]), path[:length])
        owner = owner[step]
    _check_step(owner, path[-1], path)
    owner[path[-1]] = value
    _forget_marks(document, path)


def _check_step(owner: Any, step: str | int, path: FieldPath) -> None:
    above = format_path(path[:-1]) or "the spec"
    if isinstance(owner, list):
        if not isinstance(step, int):
            raise _WrongOverrideError(f"`{above}` is a list", f"give an index, e.g. {above}[0].{step}")
        if step >= len(owner):
            raise _WrongOverrideError(
                f"`{above}` has {len(owner)} entries, the first is [0]", f"set the whole list: {above}=[...]"
            )
    elif not isinstance(owner, dict) or isinstance(step, int):
        raise _WrongOverrideError(f"`{above}` is not a {'list' if isinstance(step, int) else 'mapping'}")


def _empty(node: FieldNode | None, path: FieldPath) -> Any:
    """What an absent section starts from; an absent list of sections starts from its default's length."""
    if node is not None and node.kind == "sections" and not isinstance(path[-1], int):
        return [{} for _ in node.default or ()]
    return {}


def _forget_marks(document: Document, path: FieldPath) -> None:
    """The file no longer says what is at the path, so it must not be shown as the culprit."""
    for marks in (document.values, document.scalars):
        for stale in [owner for owner in marks if owner[: len(path)] == path]:
            del marks[stale]
