"""Requests that choose among fixed answers, as the one-token requests that an engine is asked instead.

Bookkeeping only: knows which probe belongs to which request and puts their answers together. Invariant: a request ends
once, by its last probe's answer or its first one's failure, and nothing of it is kept afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.choices import ChoiceTree, Ids
from pipeline.engine import Completion, Request, Sample, Timing, plain_ids


@dataclass(frozen=True, slots=True)
class Probe:
    """One question to the model: a prompt, and the tokens whose probabilities after it are wanted."""

    probe_id: str
    prompt_token_ids: list[int]
    tokens: Ids


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine says to one probe."""

    log_probabilities: Mapping[int, float]
    """Over the whole vocabulary, of each of the probe's tokens."""
    routed_experts: Any
    """[prompt, layers, top_k] of the probe's own prompt, or None."""
    num_cached_tokens: int
    timing: Timing


@dataclass(slots=True)
class _Open:
    request: Request
    tree: ChoiceTree
    probes: dict[str, Ids]
    """Probe id -> the answer's tokens so far, in the tree's order."""
    answers: dict[Ids, Answer] = field(default_factory=dict)


class OpenChoices:
    """All requests of one engine that choose, from `open` to their last answer."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._request_of: dict[str, str] = {}
        """Of each probe without an answer."""

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_unanswered(self) -> int:
        """Probes, of all requests."""
        return len(self._request_of)

    def __contains__(self, probe_id: str) -> bool:
        return probe_id in self._request_of

    def open(self, request: Request, tree: ChoiceTree) -> list[Probe]:
        """What to ask for the request, shortest prompt first."""
        questions = {f"{request.request_id}/{number}": each for number, each in enumerate(tree.questions)}
        self._open[request.request_id] = _Open(request, tree, {name: each.after for name, each in questions.items()})
        self._request_of |= dict.fromkeys(questions, request.request_id)
        prompt = plain_ids(request.prompt_token_ids)
        return [Probe(name, [*prompt, *each.after], each.tokens) for name, each in questions.items()]

    def answer(self, probe_id: str, answer: Answer) -> Completion | None:
        """Take one probe's answer; the request's completion once it was the last."""
        one = self._open[self._request_of.pop(probe_id)]
        one.answers[one.probes[probe_id]] = answer
        if len(one.answers) < len(one.probes):
            return None
        self.forget([one.request.request_id])
        return _completion(one)

    def request_of(self, probe_id: str) -> str:
        """The request that a probe without an answer belongs to."""
        return self._request_of[probe_id]

    def forget(self, request_ids: Sequence[str]) -> list[str]:
        """Drop these requests, unknown ones ignored; returns their probes' ids."""
        gone = [one for one in (self._open.pop(request_id, None) for request_id in request_ids) if one is not None]
        probe_ids = [probe_id for one in gone for probe_id in one.probes]
        for probe_id in probe_ids:
            self._request_of.pop(probe_id, None)
        return probe_ids


def _completion(one: _Open) -> Completion:
    """The most probable choice as if the model had generated it, with the log-probabilities of all."""
    logs = one.tree.log_probabilities({after: answer.log_probabilities for after, answer in one.answers.items()})
    best = int(logs.argmax())
    tokens = one.tree.choices[best]
    first = one.answers[next(iter(one.probes.values()))]
    last = one.answers[tokens[:-1]]  # its prompt is all that generating would route
    sample = Sample(
        index=0,
        text="",
        token_ids=tokens,
        finish_reason="stop",
        stop_reason=None,
        cumulative_logprob=float(logs[best]),
        routed_experts=last.routed_experts,
        choice_logs=tuple(float(log) for log in logs),
    )
    total_s = max(answer.timing.total_s for answer in one.answers.values())
    timing = Timing(first.timing.queue_s, first.timing.first_token_s, total_s)
    num_cached = min(first.num_cached_tokens, len(one.request.prompt_token_ids))  # a probe is longer than the prompt
    return Completion(one.request.request_id, (sample,), num_cached, timing)
