"""From the probabilities of the choices to a row's label columns. Pure.

Invariant: `label_probabilities` sums to 1 over the choices; `label` is its largest, or the default below the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.choices import distribution

LABEL, CONFIDENCE, PROBABILITIES = "label", "label_confidence", "label_probabilities"
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True, slots=True)
class LabelRule:
    """How probabilities become a label."""

    choices: tuple[str, ...]
    temperature: float = 1.0
    """From `tramontane calibrate`: log-probabilities are divided by it."""
    abstain_below: float = 0.0
    """Least probability of the most probable choice for it to be the label."""
    default: str | None = None
    """What `label` says otherwise."""

    def fields(self) -> list[pa.Field]:
        """The columns, null for rows that failed."""
        probabilities = pa.struct([(choice, pa.float64()) for choice in self.choices])
        return [
            pa.field(LABEL, _DICTIONARY),
            pa.field(CONFIDENCE, pa.float64()),
            pa.field(PROBABILITIES, probabilities),
        ]

    def text(self, choice_logs: Sequence[float]) -> str:
        """What stands for the generated text: the most probable choice, sure or not."""
        return self.choices[choice_logs.index(max(choice_logs))]

    def columns(self, choice_logs: Sequence[float]) -> dict[str, Any]:
        """One sample's values; `choice_logs` are in the order of the choices. The first of equals is the label."""
        probabilities = distribution(choice_logs, self.temperature)
        best = int(probabilities.argmax())
        confidence = float(probabilities[best])
        return {
            LABEL: self.choices[best] if confidence >= self.abstain_below else self.default,
            CONFIDENCE: confidence,
            PROBABILITIES: dict(zip(self.choices, map(float, probabilities), strict=True)),
        }
