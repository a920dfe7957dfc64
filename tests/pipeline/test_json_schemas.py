"""What a JSON schema may say here, and that what it says is checked."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import RowError
from pipeline.json_schemas import check_json_schema, schema_text, violation
from pipeline.sampling import row_sampling
from pipeline.settings import SamplingSettings
from tests.scripted_json import json_text

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "name": {"type": "string", "pattern": "^[a-z]+$"}},
    "required": ["x"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
            "required": ["children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("schema", [POINT, TREE, {"type": "object"}, deep(20), {"enum": ["a", None, 1]}])
def test_sound_schemas_pass(schema: dict[str, Any]) -> None:
    check_json_schema(schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "text"}, "no JSON schema: $.type: 'text'"),
        ({"type": "array", "uniqueItems": True, "contains": {}}, 'Unimplemented keys: ["contains", "uniqueItems"]'),
        ({"not": {"type": "string"}}, '["not"]'),
        ({"if": {}, "then": {}}, '["if", "then"]'),
        ({"type": "string", "format": "phone"}, "Unknown format: phone"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(a)\\1"}, "1"),
        ({"$ref": "https://example.com/s.json"}, "leads elsewhere"),
        ({"$ref": "file:///etc/passwd"}, "leads elsewhere"),
        ({"items": {"$ref": "#/$defs/none"}}, "leads nowhere"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "leads back to itself"),
        ({"properties": {"a": {"$id": "https://example.com/", "$ref": "#"}}}, "`$id` inside a schema"),
        (deep(70), "nested more than 64 deep"),
        ({"type": "array", "maxItems": 1_000_000}, "`maxItems` is 1000000, more than 10,000"),
        ({"enum": ["x" * 70_000]}, "characters, more than 65,536"),
        ({"const": float("nan")}, "can't be written as JSON"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "JSON can't be generated under it"),
    ],
)
def test_what_generation_would_not_follow_is_refused_by_name(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_json_schema(schema)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_values_that_look_like_schemas_are_values() -> None:
    check_json_schema({"type": "object", "default": {"$ref": "elsewhere"}, "examples": [{"maxItems": 10**9}]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"x": 1, "name": "ab"}', None),
        ('{"x": 1, "name": "AB"}', "$.name"),
        ('{"x": "1"}', "$.x"),
        ("{}", "'x' is a required property"),
        ('{"x": 1, "y": 2}', "'y' was unexpected"),
        ('{"x": 1', "not JSON"),
        ('{"x": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("", "not JSON"),
    ],
)
def test_a_violation_is_named_with_its_place(text: str, words: str | None) -> None:
    found = violation(text, schema_text(POINT))
    assert found is None if words is None else words in str(found)
    assert found is None or len(found) <= 300


def test_any_object_is_one() -> None:
    assert violation('{"a": [1]}', None) is None
    assert violation("[1]", None) == "not a JSON object"


def test_a_pattern_that_backtracking_would_never_finish_takes_no_time() -> None:
    schema = {"type": "string", "pattern": "^(a+)+$"}
    check_json_schema(schema)
    began = time.perf_counter()
    assert violation(json.dumps("a" * 50_000 + "b"), schema_text(schema)) is not None
    assert time.perf_counter() - began < 2


@given(st.integers(0, 10**9), st.sampled_from([POINT, TREE, deep(3), {"type": "object"}]))
def test_texts_made_by_a_schema_follow_it_for_an_independent_validator_too(seed: int, schema: dict[str, Any]) -> None:
    text = json_text(schema_text(schema), seed)
    assert violation(text, schema_text(schema)) is None
    jsonschema.validate(json.loads(text), schema)


def test_a_schema_of_the_settings_is_checked_and_goes_with_nothing_that_cuts() -> None:
    for wrong in (
        {"json_schema": {"$ref": "#"}},
        {"json_schema": POINT, "json_object": True},
        {"json_object": True, "stop": ["}"]},
        {"json_object": True, "ignore_eos": True},
        {"json_schema": POINT, "min_tokens": 3},
    ):
        with pytest.raises(ValidationError):
            SamplingSettings.model_validate(wrong)
    assert SamplingSettings(json_schema=POINT).is_json


def test_a_rows_own_json_replaces_the_jobs() -> None:
    base = SamplingSettings(json_schema=POINT)
    assert row_sampling(base, '{"json_object": true}').json_schema is None
    assert row_sampling(base, '{"json_schema": null}').is_json is False
    assert row_sampling(base, '{"max_tokens": 3}').json_schema == POINT
    with pytest.raises(RowError, match="uniqueItems"):
        row_sampling(base, '{"json_schema": {"uniqueItems": true}}')
