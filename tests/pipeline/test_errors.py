"""Exceptions reach other processes whole, and say what the process exits with."""

from __future__ import annotations

import pickle

import pytest

from pipeline import errors
from pipeline.errors import RowError, RunError, TramontaneError


def every_class(root: type[TramontaneError] = TramontaneError) -> list[type[TramontaneError]]:
    return [root, *(found for child in root.__subclasses__() for found in every_class(child))]


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_every_exception_survives_pickling_with_all_it_carries(kind: type[TramontaneError]) -> None:
    error = kind("bad_row", "what", "template") if issubclass(kind, RowError) else kind("what")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_exit_codes_are_those_of_the_contract() -> None:
    assert {kind.__name__: kind.exit_code for kind in every_class(RunError) if issubclass(kind, RunError)} == {
        "RunError": 3,
        "SpecError": 2,
        "InfrastructureError": 3,
    }


def test_the_tree_in_the_docstring_names_every_class() -> None:
    text = errors.__doc__ or ""
    assert [kind.__name__ for kind in every_class() if kind.__name__ not in text] == []
