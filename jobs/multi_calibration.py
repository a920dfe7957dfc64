"""A run of `label.multi` against true labels: its yes-or-no decisions, which are what has a confidence there.

Invariant: a row counts with all its labels or, where its true ones aren't known, not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.calibration import ChoiceFigures, Floats, Indices
from jobs.run import SPEC
from pipeline.labels import PROBABILITIES
from pipeline.multi_labels import THRESHOLD
from pipeline.storage import Store


@dataclass(frozen=True, slots=True)
class Decisions:
    """Of every row with known true labels, what was said and what is true of each choice: [rows, choices]."""

    choices: tuple[str, ...]
    probabilities: Floats
    truth: NDArray[np.bool_]
    threshold: float
    num_other: int
    """Rows left out."""

    @property
    def said(self) -> NDArray[np.bool_]:
        """Which labels have at least the threshold, sure or not."""
        return self.probabilities >= self.threshold

    def as_choices(self) -> tuple[Floats, Indices]:
        """Each decision as a choice between no and yes: probabilities [decisions, 2], and which of the two is true."""
        yes = self.probabilities.reshape(-1)
        return np.stack([1 - yes, yes], axis=1), self.truth.reshape(-1).astype(np.int64)

    def figures(self) -> list[ChoiceFigures]:
        """Precision and recall of every label."""
        found = []
        for index, choice in enumerate(self.choices):
            is_gold, is_said = self.truth[:, index], self.said[:, index]
            both, num_gold, num_said = int((is_gold & is_said).sum()), int(is_gold.sum()), int(is_said.sum())
            precision, recall = (both / total if total else None for total in (num_said, num_gold))
            found.append(ChoiceFigures(choice, num_gold, num_said, precision, recall))
        return found

    def shares(self) -> dict[str, float]:
        """Of decisions, and of rows, that are right; a row is with all its labels and no other."""
        right = self.said == self.truth
        return {"accuracy": float(right.mean()), "rows_all_right": float(right.all(axis=1).mean())}


def decisions_of(store: Store, tables: Iterator[pa.Table], gold_column: str) -> Decisions:
    """What parts' label columns say; `tables` have them and the true labels, as lists or as lists in JSON text."""
    choices: tuple[str, ...] = ()
    said: list[Floats] = [np.empty((0, 0))]
    truth: list[list[bool]] = []
    num_other = 0
    for table in tables:
        kind = table.schema.field(PROBABILITIES).type
        choices = tuple(kind.field(index).name for index in range(kind.num_fields))
        labelled = table.filter(table.column(PROBABILITIES).is_valid())
        trues = [_true_labels(value, choices) for value in labelled.column(gold_column).to_pylist()]
        known = [row for row, true in enumerate(trues) if true is not None]
        rows = labelled.column(PROBABILITIES).combine_chunks()
        said.append(np.stack([rows.field(index).to_numpy() for index in range(len(choices))], axis=1)[known])
        truth += [[choice in true for choice in choices] for true in trues if true is not None]
        num_other += len(trues) - len(known)
    probabilities = np.concatenate([each.reshape(-1, len(choices)) for each in said]) if choices else said[0]
    shaped = np.array(truth, dtype=np.bool_).reshape(-1, len(choices))
    return Decisions(choices, probabilities, shaped, _threshold(store), num_other)


def _true_labels(value: Any, choices: Sequence[str]) -> frozenset[str] | None:
    """None where they aren't known: null, no list, or a label that is none of the choices."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not all(isinstance(each, str) and each in choices for each in value):
        return None
    return frozenset(value)


def _threshold(store: Store) -> float:
    """Which one the run was started with."""
    given = json.loads(store.read(SPEC))["label"].get("threshold")
    return THRESHOLD if given is None else float(given)
