"""Requests of vLLM that come out piece by piece, put together again at their end.

Takes vLLM's objects as they come and imports nothing of it. Invariant: what is put together equals what vLLM gives for
the same request in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pipeline.engine import Completion, Failure, Piece
from pipeline.vllm_outputs import convert, token_logs


@dataclass(slots=True)
class _OpenSample:
    """One sample so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    last: Any = None
    """The latest of vLLM's outputs of it."""


class OpenStreams:
    """The streamed requests that an engine has."""

    def __init__(self, layers: Sequence[int]) -> None:
        """`layers`: those that route, see `pipeline.vllm_outputs.convert`."""
        self._layers = layers
        self._open: dict[str, dict[int, _OpenSample]] = {}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._open)

    def open(self, request_id: str, num_samples: int) -> None:
        """Begin a request."""
        self._open[request_id] = {index: _OpenSample() for index in range(num_samples)}

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop these requests; unknown ids are ignored."""
        for request_id in request_ids:
            self._open.pop(request_id, None)

    def take(self, outputs: Sequence[Any]) -> tuple[list[Completion | Failure | Piece], list[Any]]:
        """What one step brought of the streamed requests, and its outputs that aren't theirs."""
        mine: list[Completion | Failure | Piece] = []
        others = []
        for output in outputs:
            if output.request_id in self._open:
                mine.extend(self._take(output))
            else:
                others.append(output)
        return mine, others

    def _take(self, output: Any) -> Iterator[Completion | Failure | Piece]:
        samples = self._open[output.request_id]
        for delta in output.outputs:
            sample = samples[delta.index]
            sample.text.append(delta.text)
            sample.token_ids += delta.token_ids
            sample.logprobs += delta.logprobs or []
            sample.last = delta
            if delta.text or delta.token_ids:
                logs = token_logs(delta)
                yield Piece(output.request_id, delta.index, delta.text, len(delta.token_ids), logs or ())
        if output.finished:
            del self._open[output.request_id]
            whole = [_whole(index, sample) for index, sample in samples.items()]
            parts = {"request_id": output.request_id, "num_cached_tokens": output.num_cached_tokens}
            yield convert(SimpleNamespace(outputs=whole, metrics=output.metrics, **parts), self._layers, with_logs=True)


def _whole(index: int, sample: _OpenSample) -> SimpleNamespace:
    """All of a sample, shaped as vLLM's output of it."""
    last = sample.last
    return SimpleNamespace(
        index=index,
        text="".join(sample.text),
        token_ids=sample.token_ids,
        logprobs=sample.logprobs or None,
        finish_reason=last.finish_reason if last is not None else None,
        stop_reason=last.stop_reason if last is not None else None,
        cumulative_logprob=last.cumulative_logprob if last is not None else None,
        routed_experts=getattr(last, "routed_experts", None),
    )
