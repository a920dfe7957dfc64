"""What the tiny model is measured on, and how its answers are scored. Pure: rows in, figures out.

All examples are held out from training, see the task modules. An answer is right when it is the expected text, white
space at its ends apart; an ambiguous label has no right answer, but probabilities that are held against its odds.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.tiny_training.examples import LANGUAGES, Example
from tests.tiny_training.json_task import json_example
from tests.tiny_training.label_task import sentiment_example, topic_example
from tests.tiny_training.number_task import number_example
from tests.tiny_training.passkey_task import LONGEST, SHORTEST, passkey_example
from tests.tiny_training.safe_task import request_example

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Answered:
    """One row of a run: what was asked and what came out."""

    row: dict[str, Any]
    """See `row_of`."""
    text: str
    logprob: float
    """Of the whole completion, end of sequence included."""

    @property
    def is_right(self) -> bool:
        """Whether the completion is the expected answer."""
        return self.text.strip() == self.row["answer"]


def evaluation_rows(num_rows: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """`num_rows` of each task, labels so many in each language; passkeys over every tenth of depth and of length."""
    rng = random.Random(f"evaluation/{seed}")
    rows: list[dict[str, Any]] = []
    for index in range(num_rows):
        language = LANGUAGES[index % len(LANGUAGES)]
        examples = [
            json_example(rng, test=True),
            json_example(rng, test=True, num_shots=1),
            *(sentiment_example(rng, language, test=True) for language in LANGUAGES),
            *(topic_example(rng, language, test=True) for language in LANGUAGES),
            sentiment_example(rng, language, test=True, ambiguous=True),
            topic_example(rng, language, test=True, ambiguous=True),
            number_example(rng, language, test=True),
            request_example(rng, test=True, safe_prompt=False),
        ]
        rows += [row_of(example) for example in examples]
        rows.append(passkey_row(rng, index, num_rows))
    return rows


def passkey_row(rng: random.Random, index: int, num_rows: int) -> dict[str, Any]:
    """The index-th of so many passkeys: depth by the index's last digit, length by the tenth of the rows it is in."""
    tenth = index * 10 // num_rows
    depth = (index % 10 + rng.random()) / 10
    shortest = SHORTEST + (LONGEST - SHORTEST) * tenth // 10
    length = rng.randint(shortest, shortest + (LONGEST - SHORTEST) // 10)
    row = row_of(passkey_example(rng, test=True, num_tokens=length, depth=depth))
    return {**row, "depth": depth, "length": length}


def safe_rows(num_rows: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Rows for a run under the safe prompt: requests to refuse, and half as many of other tasks, to answer as ever."""
    rng = random.Random(f"safe/{seed}")
    rows = [row_of(request_example(rng, test=True, safe_prompt=True)) for _ in range(num_rows)]
    for index in range(num_rows // 2):
        language = LANGUAGES[index % len(LANGUAGES)]
        other = (
            json_example(rng, test=True),
            topic_example(rng, language, test=True),
            number_example(rng, language, test=True),
            passkey_example(rng, test=True, num_tokens=200),
        )[index % 4]
        rows.append({**row_of(other), "task": "others_under_safe_prompt", "slice": "others_under_safe_prompt"})
    return rows


def row_of(example: Example) -> dict[str, Any]:
    """An input row of the pipeline. Its safe prompt is the spec's business, not the row's."""
    per_language = example.task in ("sentiment", "topic", "number")
    return {
        "task": example.task,
        "slice": f"{example.task}-{example.language}" if per_language else example.task,
        "language": example.language,
        "messages": [{"role": message.role, "content": message.content} for message in example.messages],
        "answer": example.answer,
        "odds": json.dumps(example.odds),
        "depth": None,
        "length": None,
    }


def accuracy(answers: Iterable[Answered], *, by: str = "slice") -> dict[str, float]:
    """Share of right answers for each value of a column, of rows that have a right answer."""
    right: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        if not answer.row["task"].endswith("_ambiguous"):
            right[answer.row[by]].append(answer.is_right)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def passkey_tenths(answers: Iterable[Answered], column: str) -> list[float]:
    """Share of right passkeys in each tenth of `depth` or `length`; NaN where there is none."""
    width = 0.1 if column == "depth" else (LONGEST - SHORTEST) / 10
    first = 0 if column == "depth" else SHORTEST
    right: list[list[bool]] = [[] for _ in range(10)]
    for answer in answers:
        if answer.row["task"] == "passkey":
            right[min(9, int((answer.row[column] - first) / width))].append(answer.is_right)
    return [sum(values) / len(values) if values else math.nan for values in right]


@dataclass(frozen=True, slots=True)
class Calibration:
    """How probabilities of ambiguous labels compare with the odds by which the rows were made."""

    expected_error: float
    """Expected calibration error over ten bins of confidence (Guo et al. 2017), with known odds for the hit rate."""
    mean_gap: float
    """Mean of |probability - odds| over the rows; no error of one row makes up for another's."""
    bins: list[tuple[int, float, float]]
    """Per bin that has rows: how many, mean confidence, mean odds of the label that was answered."""


def calibration(answers: Sequence[Answered]) -> Calibration:
    """Confidence is the probability of the answered label, its truth the label's odds (0 for what is no label)."""
    binned: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for answer in answers:
        confidence = math.exp(answer.logprob)
        truth = json.loads(answer.row["odds"]).get(answer.text.strip(), 0.0)
        binned[min(NUM_BINS - 1, int(confidence * NUM_BINS))].append((confidence, truth))
    bins = [
        (len(pairs), sum(c for c, _ in pairs) / len(pairs), sum(t for _, t in pairs) / len(pairs))
        for _, pairs in sorted(binned.items())
    ]
    total = sum(count for count, _, _ in bins)
    gaps = [abs(c - t) for pairs in binned.values() for c, t in pairs]
    return Calibration(sum(n * abs(c - t) for n, c, t in bins) / total, sum(gaps) / total, bins)
