"""What vLLM is asked for each request, and what its answers are of: one in one piece, in many, or a probe of a choice.

Takes vLLM's objects as they come and imports nothing of it. Invariant: nothing is kept of a request that has ended, or
was forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.choice_requests import Answer, OpenChoices, Probe
from pipeline.engine import Completion, Failure, Piece, Request
from pipeline.vllm_outputs import convert
from pipeline.vllm_streams import OpenStreams


@dataclass(frozen=True, slots=True)
class Taken:
    """What one step's outputs were."""

    results: list[Completion | Failure | Piece]
    stale: list[str]
    """What vLLM need not go on with: probes of choices that have failed."""


class VllmRequests:
    """The requests that one engine has, by what vLLM was asked for them."""

    def __init__(self, layers: Sequence[int]) -> None:
        """`layers`: those that route, see `pipeline.vllm_outputs.convert`."""
        self._layers = layers
        self._choices = OpenChoices()
        self._streams = OpenStreams(layers)
        self._logged: set[str] = set()
        """Requests in one piece that ask for their tokens' log-probabilities."""

    def open(self, request: Request) -> None:
        """Begin a request that is asked as it is."""
        if request.stream:
            self._streams.open(request.request_id, request.sampling.n)
        elif request.num_top_logs is not None:
            self._logged.add(request.request_id)

    def open_choice(self, request: Request) -> list[Probe]:
        """Begin a request that chooses; returns what to ask for it."""
        assert request.choices is not None  # noqa: S101  the caller has looked
        return self._choices.open(request, request.choices)

    def forget(self, request_ids: Sequence[str]) -> list[str]:
        """Drop these requests; returns what vLLM has of them, by its ids."""
        self._streams.forget(request_ids)
        self._logged.difference_update(request_ids)
        return [*request_ids, *self._choices.forget(request_ids)]

    def num_sequences(self, num_unfinished: int) -> int:
        """Sequences that requests take, of which vLLM counts `num_unfinished`: a choice takes one, not one a probe."""
        return num_unfinished - self._choices.num_unanswered + len(self._choices)

    def take(self, outputs: Sequence[Any]) -> Taken:
        """What one step brought."""
        streamed, others = self._streams.take(outputs) if self._streams else ([], outputs)
        finished = [output for output in others if output.finished]
        probes = [output for output in finished if output.request_id in self._choices]
        ended = [self._ended(output) for output in finished if output.request_id not in self._choices]
        taken = Taken([*streamed, *ended], [])
        for output in probes:
            self._take_probe(output, taken)
        return taken

    def _ended(self, output: Any) -> Completion | Failure:
        with_logs = output.request_id in self._logged
        if with_logs:
            self._logged.discard(output.request_id)
        return convert(output, self._layers, with_logs=with_logs)

    def _take_probe(self, output: Any, taken: Taken) -> None:
        if output.request_id not in self._choices:  # another one of its request has failed in this step
            return
        converted = convert(output, self._layers)
        if isinstance(converted, Failure):
            request_id = self._choices.request_of(output.request_id)
            taken.results.append(Failure(request_id, converted.kind, converted.message))
            taken.stale.extend(self.forget([request_id]))
            return
        [sample] = converted.samples
        logs = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        answer = Answer(logs, sample.routed_experts, converted.num_cached_tokens, converted.timing)
        completion = self._choices.answer(output.request_id, answer)
        if completion is not None:
            taken.results.append(completion)
