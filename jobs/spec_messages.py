"""pydantic's errors -> Problems in the words of the spec: the value as written, what is allowed, what was meant.

Owns the wording for wrong types, ranges, unknown and missing fields. Knows nothing of how a problem is displayed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jobs.spec_errors import MOST_SHOWN
from jobs.spec_fields import FieldNode, describe_allowed, field_tree, find_field, format_path, schema_at, suggest
from jobs.yaml_source import FieldPath, Problem, Scalar, plain_value

_LONGEST_VALUE = 60


def problems_of(error: ValidationError, data: Any, scalars: Mapping[FieldPath, Scalar]) -> list[Problem]:
    """One Problem per wrong field; alternatives of a union count as one."""
    by_path: dict[FieldPath, ErrorDetails] = {}
    for details in error.errors(include_url=False, include_input=False):
        by_path.setdefault(_real_path(details, data), details)
    explained_deeper = {path[:length] for path in by_path for length in range(len(path))}
    wrong = [path for path in by_path if path not in explained_deeper]
    # One more than is shown: looking for what was meant takes 1 ms each, and a data file has thousands of keys.
    return [_problem(path, by_path[path], data, scalars) for path in wrong[: MOST_SHOWN + 1]]


def unknown_field(path: FieldPath) -> Problem:
    """A path that no field of the spec has."""
    parent = find_field(path[:-1]) or field_tree()
    meant = suggest(path)
    hint = f"did you mean `{meant}`? " if meant else ""
    where = f"`{format_path(path[:-1])}`" if len(path) > 1 else "the spec"
    allowed = ", ".join(parent.children) or "nothing below it"
    message = f"`{format_path(path)}` is not a field"
    return Problem(path, message, hint=f"{hint}{where} has: {allowed}", on_key=True)


def shown_value(value: Any, scalar: Scalar | None) -> str:
    """A value as it was written, short."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if scalar is None:
        text = "null" if value is None else str(value)
    elif scalar.style:
        text = f'"{scalar.text}"'
    else:
        text = scalar.text or "empty"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _real_path(details: ErrorDetails, data: Any) -> FieldPath:
    """Location in the data: pydantic's less the names of union members, which are not in the data."""
    path: list[str | int] = []
    last = len(details["loc"]) - 1
    for index, step in enumerate(details["loc"]):
        is_entry = isinstance(data, list) and isinstance(step, int) and step < len(data)
        if is_entry or (isinstance(data, dict) and step in data):
            data = data[step]
        elif not (index == last and details["type"] == "missing"):
            continue
        path.append(step)
    if at := details.get("ctx", {}).get("at"):
        path.append(at)
    return tuple(path)


def _problem(path: FieldPath, details: ErrorDetails, data: Any, scalars: Mapping[FieldPath, Scalar]) -> Problem:
    name, kind = format_path(path), details["type"]
    if kind == "extra_forbidden":
        return unknown_field(path)
    if kind == "missing":
        node = find_field(path)
        hint = f"{name}: {_first_sentence(node)}" if node else None
        return Problem(path, f"`{name}` is missing", hint=hint, on_key=True)
    if kind == "contradiction":
        return Problem(path, f"`{name}`: {details['msg']}")
    value, scalar = _value_at(data, path), scalars.get(path)
    shown = shown_value(value, scalar)
    message = f"`{name}` is {shown}, but must be {_allowed(path, details)}"
    return Problem(path, message, hint=_cure(path, details, value, scalar))


def _value_at(data: Any, path: FieldPath) -> Any:
    for step in path:
        if isinstance(data, dict) and step not in data:
            return None
        data = data[step]
    return data


def _first_sentence(node: FieldNode) -> str:
    if node.kind in ("section", "option"):
        needed = [child.path[-1] for child in node.children.values() if child.is_required]
        return f"a mapping with {', '.join(needed or node.children)}"
    return node.doc.partition("\n")[0]


def _allowed(path: FieldPath, details: ErrorDetails) -> str:
    node = find_field(path)
    if node is None:
        return details["msg"].removeprefix("Input should be ")
    if details["type"] == "string_pattern_mismatch":
        return f"a name. {node.doc.rstrip('.')}"
    if node.kind in ("section", "option", "sections"):
        entries = f"a mapping with: {', '.join(node.children)}"
        is_entry = bool(path) and isinstance(path[-1], int)
        return entries if node.kind != "sections" or is_entry else f"a list with at least one entry, each {entries}"
    return describe_allowed(schema_at(path))


def _cure(path: FieldPath, details: ErrorDetails, value: Any, scalar: Scalar | None) -> str | None:
    kind, name = details["type"], path[-1] if path else ""
    written = scalar.text if scalar else ""
    if kind == "literal_error":
        return _cure_literal(path, written)
    if kind == "string_type" and isinstance(value, bool | int | float):
        reads = "true or false" if isinstance(value, bool) else f"the number {value}"
        return f'YAML reads {written} as {reads}; quote it to make it text: {name}: "{written}"'
    if kind == "bool_type" and str(value).casefold() in ("yes", "on", "y", "no", "off", "n", "true", "false"):
        is_yes = str(value).casefold() in ("yes", "on", "y", "true")
        return f"write {name}: {'true' if is_yes else 'false'}"
    if kind in ("int_type", "float_type", "int_from_float"):
        return _cure_number(str(name), value, written)
    if kind == "list_type" and isinstance(value, str):
        return f'write {name}: ["{written}"]' if written else f"write {name}: []"
    return None


def _cure_number(name: str, value: Any, written: str) -> str | None:
    if isinstance(value, float) and value.is_integer():
        return f"write {name}: {int(value)}"
    if isinstance(value, str) and re.fullmatch(r"\d[\d_,]*\d", written):
        return f"write {name}: {int(re.sub('[_,]', '', written))}"
    if isinstance(value, str) and isinstance(plain_value(written), float):
        return f"write {name}: {written}, without quotes"
    return None


def _cure_literal(path: FieldPath, written: str) -> str | None:
    schema = schema_at(path)
    options = [str(value) for option in schema.get("anyOf", [schema]) for value in option.get("enum", [])]
    close = [option for option in options if option.casefold() == written.casefold()]
    if not close:
        close = difflib.get_close_matches(written.casefold(), options, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else None
