"""Which JSON schemas completions may be made to follow, and whether a text follows one.

Pure, and light until a schema is there. A schema may come from a row, so from anyone: size, depth and repetitions are
limited, references stay inside it, and its patterns run on an engine of linear time.
Guarantees:
- a schema that is accepted holds nothing that generation under it would ignore; what does is named.
- `violation` of an accepted schema takes time linear in its patterns' text, and never raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

MAX_SCHEMA_CHARS = 65_536
MAX_SCHEMA_DEPTH = 64
MAX_REPETITIONS = 10_000
"""Of a string's characters, a list's entries or a mapping's keys. A million entries take 5.5 s to refuse."""
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_SAME_PLACE = ("allOf", "anyOf", "oneOf")
"""Keywords whose schemas speak of the very value that theirs does."""
_LITERAL = ("const", "enum", "default", "examples")
"""Keywords that hold values, not schemas."""
_CHILDREN = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else")
_NAMED_CHILDREN = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_MAX_MESSAGE = 300


def check_json_schema(schema: Mapping[str, Any]) -> None:
    """Refuse a schema that generation can't follow to the letter.

    Raises:
        ValueError: not a schema, too large, refers to elsewhere or to itself, or has a keyword that isn't supported.
    """
    if (problem := _problem(schema_text(schema))) is not None:
        raise ValueError(problem)


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as compact JSON, its keys in their order: generation writes properties in it.

    Raises:
        ValueError: it holds something that isn't JSON, or is nested too deep to be written.
    """
    try:
        return json.dumps(schema, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it can't be written as JSON: {error}") from None


def violation(text: str, schema: str | None) -> str | None:
    """Where and how a text breaks a schema (as `schema_text` gives it; None for any JSON object); None if it doesn't.

    The message is for people and for the model that is to correct itself: at most 300 characters.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"[:_MAX_MESSAGE]
    if schema is None:
        return None if isinstance(value, dict) else "not a JSON object"
    from jsonschema.exceptions import best_match

    try:
        broken = best_match(_validator(schema).iter_errors(value))
    except RecursionError:
        return "nested too deep to be checked"
    return None if broken is None else f"{broken.json_path}: {broken.message}"[:_MAX_MESSAGE]


@lru_cache(maxsize=256)
def _problem(text: str) -> str | None:
    """What is wrong with a schema, with the cure; cached, for many rows may bring the same."""
    if len(text) > MAX_SCHEMA_CHARS:
        return f"it has {len(text):,} characters, more than {MAX_SCHEMA_CHARS:,}; describe less"
    schema = json.loads(text)
    return _too_large(schema) or _no_schema(schema) or _bad_references(schema) or _refused(text) or _slow(schema)


def _too_large(schema: Any) -> str | None:
    stack = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_SCHEMA_DEPTH:
            return f"it is nested more than {MAX_SCHEMA_DEPTH} deep; use `$defs` and `$ref`"
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        stack += [(child, depth + 1) for child in children]
    for each in _subschemas(schema):
        for name in _COUNTS:
            if isinstance(each.get(name), int | float) and each[name] > MAX_REPETITIONS:
                return f"`{name}` is {each[name]}, more than {MAX_REPETITIONS:,}; lower it"
    return None


def _no_schema(schema: Any) -> str | None:
    from jsonschema import Draft202012Validator, FormatChecker
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema, format_checker=FormatChecker(()))  # no pattern through `re`
    except SchemaError as error:
        return f"no JSON schema: {error.json_path}: {error.message}"[:_MAX_MESSAGE]
    return None


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema in a schema, itself first; values that only look like one are left out."""
    stack = [schema]
    while stack:
        each = stack.pop()
        if not isinstance(each, dict):
            continue
        yield each
        stack += [each[name] for name in _CHILDREN if name in each]
        for name in (*_SAME_PLACE, "prefixItems"):
            stack += each[name] if isinstance(each.get(name), list) else []
        for name in _NAMED_CHILDREN:
            stack += each[name].values() if isinstance(each.get(name), dict) else []


def _bad_references(schema: Any) -> str | None:
    for each in _subschemas(schema):
        if "$dynamicRef" in each:
            return "`$dynamicRef` isn't supported; use `$ref`"
        if "$ref" in each and not str(each["$ref"]).startswith("#"):
            return f"`$ref` {str(each['$ref'])[:80]!r} leads elsewhere; put that schema under `$defs`, '#/$defs/NAME'"
        if each is not schema and "$id" in each:
            return "`$id` inside a schema isn't supported; leave it out"
        if "$ref" in each and _resolve(schema, each["$ref"]) is None:
            return f"`$ref` {str(each['$ref'])[:80]!r} leads nowhere in this schema"
    loops = any(_leads_to_itself(schema, each) for each in _subschemas(schema))
    return "a `$ref` leads back to itself without a property or an entry between" if loops else None


def _resolve(schema: Any, reference: str) -> Any:
    """What a local reference points at; None for nothing that is a schema."""
    found = schema
    for step in reference.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found if isinstance(found, dict | bool) and (reference == "#" or reference.startswith("#/")) else None


def _leads_to_itself(schema: Any, start: dict[str, Any]) -> bool:
    """Whether to check a value against `start` is to check that same value against it."""
    stack, seen = list(_at_same_place(schema, start)), set[int]()
    while stack:
        each = stack.pop()
        if each is start:
            return True
        if id(each) not in seen:
            seen.add(id(each))
            stack += _at_same_place(schema, each)
    return False


def _at_same_place(schema: Any, each: dict[str, Any]) -> Iterator[dict[str, Any]]:
    near = [option for name in _SAME_PLACE for option in each.get(name, ())]
    if "$ref" in each:
        near.append(_resolve(schema, each["$ref"]))
    yield from (one for one in near if isinstance(one, dict))


def _refused(text: str) -> str | None:
    """What the library that generates would refuse, or drop without a word. It names the keywords."""
    from llguidance import LLMatcher

    try:
        reason = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text))
    except ValueError as error:
        reason = str(error)
    if not reason:
        return None
    cure = "leave out what it names, or say it by other keywords"
    return f"JSON can't be generated under it: {str(reason)[:_MAX_MESSAGE]}; {cure}"


def _slow(schema: Any) -> str | None:
    for each in _subschemas(schema):
        for pattern in (each.get("pattern"), *each.get("patternProperties", ())):
            try:
                _compiled(pattern or "")
            except ValueError as error:
                return f"pattern {pattern[:80]!r}: {error}; write it without look-around and back-references"
    return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@lru_cache(maxsize=256)
def _validator(text: str) -> Any:
    """Of the dialect and the formats that are checked while generating, with patterns on RE2 instead of `re`."""
    from jsonschema import Draft202012Validator, FormatChecker, validators

    kind = validators.extend(Draft202012Validator, {"pattern": _pattern, "patternProperties": _pattern_properties})
    return kind(json.loads(text), format_checker=FormatChecker())


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(value, str) and not _found(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], value: Any, _: Any) -> Iterator[Any]:
    for pattern, schema in patterns.items() if isinstance(value, dict) else ():
        for name in value:
            if _found(pattern, name):
                yield from validator.descend(value[name], schema, path=name, schema_path=pattern)


def _found(pattern: str, value: str) -> bool:
    return _compiled(pattern).search(value) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise ValueError(str(error)) from None
