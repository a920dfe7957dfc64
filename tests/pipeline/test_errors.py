"""Exceptions reach other processes whole, and say what the process exits with."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

import pytest

from cluster.serve_errors import ApiError
from jobs.ray_jobs import UnknownJob
from pipeline import errors
from pipeline.errors import ERROR_KINDS, INVALID_JSON, RETRYABLE_KINDS, RowError, RunError, TramontaneError

ROOT = Path(errors.__file__).parents[1]


def every_class(root: type[TramontaneError] = TramontaneError) -> list[type[TramontaneError]]:
    return [root, *(found for child in root.__subclasses__() for found in every_class(child))]


def example(kind: type[TramontaneError]) -> TramontaneError:
    if issubclass(kind, RowError):
        return kind("bad_row", "what", "template")
    if issubclass(kind, ApiError):
        return kind(400, "what", code="why", param="top_p")
    return kind("what")


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_every_exception_survives_pickling_with_all_it_carries(kind: type[TramontaneError]) -> None:
    error = example(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_exit_codes_are_those_of_the_contract() -> None:
    assert {kind.__name__: kind.exit_code for kind in every_class(RunError) if issubclass(kind, RunError)} == {
        "RunError": 3,
        "SpecError": 2,
        UnknownJob.__name__: 2,
        "InfrastructureError": 3,
    }


def test_the_tree_in_the_docstring_names_every_class() -> None:
    text = errors.__doc__ or ""
    assert [kind.__name__ for kind in every_class() if kind.__name__ not in text] == []


def kinds_in_the_code() -> set[str]:
    """First arguments of every `RowError(...)` that are written out."""
    found: set[str] = set()
    for file in (ROOT / "pipeline").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RowError":
                found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def test_kinds_of_rows_are_those_that_the_readme_explains_and_the_code_raises() -> None:
    table = (ROOT / "README.md").read_text().partition("Why rows fail")[2].partition("## ")[0]
    explained = {name for row in re.findall(r"^\|(.*?)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert explained - {"node_lost", "replica_unreachable"} == ERROR_KINDS | {INVALID_JSON}
    assert len(kinds_in_the_code()) > 8
    assert kinds_in_the_code() <= ERROR_KINDS
    assert RETRYABLE_KINDS <= ERROR_KINDS
