"""Any number of labels a row (`label.multi`): from a yes or no about each label to the row's columns. Pure.

The answers that are compared are `LABEL: yes` and `LABEL: no`, the beginning `LABEL:` taken as said. So a label's
probability is p = 1 / (1 + exp((log P(no) - log P(yes)) / temperature)), each P the model's after prompt and beginning:
it depends on no other label's, and a row's probabilities don't sum to 1.
Invariant: `labels` are those of at least the threshold, in the order of the choices; or, when the row's least sure
decision is not sure enough, the default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.choices import distribution
from pipeline.labels import CONFIDENCE, PROBABILITIES

LABELS = "labels"
THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class MultiLabelRule:
    """How yeses and noes become labels."""

    choices: tuple[str, ...]
    temperature: float = 1.0
    threshold: float = THRESHOLD
    """Least probability of a label that is given."""
    abstain_below: float = 0.0
    """Least confidence for a row to get its labels."""
    default: str | None = None
    """The one label of a row below it; null for null instead of a list."""

    def fields(self) -> list[pa.Field]:
        """The columns, null for rows that failed."""
        probabilities = pa.struct([(choice, pa.float64()) for choice in self.choices])
        return [
            pa.field(LABELS, pa.list_(pa.string())),
            pa.field(CONFIDENCE, pa.float64()),
            pa.field(PROBABILITIES, probabilities),
        ]

    def columns(self, choice_logs: Sequence[float]) -> dict[str, Any]:
        """One sample's values; `choice_logs` are of `yes_or_no` of each choice in turn.

        Confidence is that of the least sure decision: p of a label that is given, 1 - p of one that isn't.
        """
        probabilities = self._probabilities(choice_logs)
        given = self._given(probabilities)
        confidence = min(p if choice in given else 1 - p for choice, p in probabilities.items())
        unsure = [self.default] if self.default is not None else None
        return {
            LABELS: given if confidence >= self.abstain_below else unsure,
            CONFIDENCE: confidence,
            PROBABILITIES: probabilities,
        }

    def text(self, choice_logs: Sequence[float]) -> str:
        """What stands for the generated text: the labels, sure or not, as JSON."""
        return json.dumps(self._given(self._probabilities(choice_logs)), ensure_ascii=False)

    def _probabilities(self, choice_logs: Sequence[float]) -> dict[str, float]:
        pairs = zip(choice_logs[::2], choice_logs[1::2], strict=True)
        return {
            choice: float(distribution(pair, self.temperature)[0])
            for choice, pair in zip(self.choices, pairs, strict=True)
        }

    def _given(self, probabilities: dict[str, float]) -> list[str]:
        return [choice for choice, p in probabilities.items() if p >= self.threshold]
