"""Probabilities of whole answers out of a fixed list: which tokens to ask a model about, and what follows from them.

Pure. Choices may have several tokens, share a beginning, or be the beginning of one another: each ends with the model's
end token, so that `bug` does not stand for all of `bug report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What the model must be asked: after these tokens of the answer, how probable is each of those?"""

    after: Ids
    """Tokens of the answer so far; empty at its beginning."""
    tokens: Ids
    """Possible next ones, ascending."""


@dataclass(frozen=True, slots=True)
class ChoiceTree:
    """Token ids of each choice; with its end token where it could be the beginning of another.

    Guarantees:
    - every token of every choice is asked about once, together with its rivals, however many choices share it.
    - a choice's probability is the model's: the product over its tokens but for those taken as said.
    """

    choices: tuple[Ids, ...]
    said: tuple[int, ...] = ()
    """Of each choice, how many tokens at its beginning are taken as said, and not asked about; empty for none."""

    def __post_init__(self) -> None:
        """Refuse what has no probability of its own."""
        if not self.choices or not all(self.choices):
            raise ValueError("there must be choices, and each must have a token")
        if self.said and not all(0 <= n < len(ids) for n, ids in zip(self.said, self.choices, strict=True)):
            raise ValueError("of every choice at least one token must be left to ask about")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices have the same tokens")
        prefixes = {choice[:end] for choice in self.choices for end in range(1, len(choice))}
        if prefixes & set(self.choices):
            raise ValueError("a choice is the beginning of another; end both with the end token")

    @property
    def questions(self) -> list[Question]:
        """All that must be asked, shortest first: each finds its prompt cached by one before."""
        nexts: dict[Ids, set[int]] = {}
        for choice, first in self._asked():
            for end, token in enumerate(choice[first:], start=first):
                nexts.setdefault(choice[:end], set()).add(token)
        ordered = sorted(nexts, key=lambda after: (len(after), after))
        return [Question(after, tuple(sorted(nexts[after]))) for after in ordered]

    def log_probabilities(self, answers: Mapping[Ids, Mapping[int, float]]) -> NDArray[np.float64]:
        """Natural log of each choice's own probability after what is taken as said, not normalised over the choices.

        Args:
            answers: per `Question.after`, the log-probability of each of its tokens over the whole vocabulary.

        Raises:
            KeyError: an answer is missing.
        """
        return np.array(
            [
                math.fsum(answers[choice[:end]][choice[end]] for end in range(first, len(choice)))
                for choice, first in self._asked()
            ]
        )

    def _asked(self) -> Iterator[tuple[Ids, int]]:
        """Each choice, and its first token to ask about."""
        return zip(self.choices, self.said or (0,) * len(self.choices), strict=True)


def distribution(
    log_probabilities: Sequence[float] | NDArray[np.float64], temperature: float = 1.0
) -> NDArray[np.float64]:
    """Probabilities over the choices: softmax of the logs divided by `temperature` (above 1 flattens).

    Choices that the model gives no probability at all get none; if that is every one of them, they are equal.
    """
    logs = np.asarray(log_probabilities, dtype=np.float64) / temperature
    best = logs.max()
    if not np.isfinite(best):
        return np.full(len(logs), 1 / len(logs))
    weights = np.exp(logs - best)
    return weights / weights.sum()  # type: ignore[no-any-return]
