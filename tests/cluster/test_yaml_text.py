"""Commented YAML text: what is read back is what was meant."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.yaml_text import Commented, yaml_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "yes",
        "Null",
        "~",
        "1e3",
        "0x1f",
        "a: b",
        "- a",
        "# a",
        "a #b",
        "2026-01-01",
        "a\nb\n",
        "a\n\nb",
        " a\nb",
        "a \nb",
        "=",
        "!a",
        "&a",
    ]
)
SCALARS = TEXTS | st.integers() | st.booleans() | st.none()
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=12
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(TEXTS, DATA, min_size=1, max_size=4))
def test_text_reads_back_as_the_data(data: dict[str, Any]) -> None:
    assert yaml.safe_load(yaml_text([Commented(data)])) == data


def test_comments_stand_above_their_keys_and_in_lists_above_their_entry() -> None:
    data = {"a": {"b": 1}, "list": [{"name": "x", "c": [1]}, {"name": "y"}]}
    comments = {("a", "b"): "about b", ("list", "x", "name"): "about x", ("list", "x", "c"): "about c"}
    assert yaml_text([Commented(data, ["head"], comments)]) == (
        '# head\na:\n  # about b\n  b: 1\nlist:\n# about x\n- name: x\n  # about c\n  c:\n  - 1\n- name: "y"\n'
    )


def test_long_comments_are_wrapped() -> None:
    text = yaml_text([Commented({"a": 1}, (), {("a",): "word " * 60})])
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("word") == 60


def test_several_documents_are_kept_apart() -> None:
    text = yaml_text([Commented({"a": "x\ny\n"}), Commented({"b": 2}, ["second"])])
    assert list(yaml.safe_load_all(text)) == [{"a": "x\ny\n"}, {"b": 2}]


def test_lines_of_text_stay_readable() -> None:
    assert yaml_text([Commented({"job": "a: 1\nb: 2\n"})]) == "job: |\n  a: 1\n  b: 2\n"


@pytest.mark.parametrize("empty", [{}, []])
def test_empty_collections_stay(empty: Any) -> None:
    assert yaml.safe_load(yaml_text([Commented({"a": empty})])) == {"a": empty}
