"""What a replica says of requests: samples as text and statistics, failures, and what one poll brings of them.

All of it travels between processes, by the million: no per-token arrays, and no slots where there are many (see
`engine`). Knows nothing of threads, mailboxes or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.engine import UNKNOWN_TIMING, Failure, MoeShape, Piece, Sample, Timing, TokenLog
from pipeline.errors import RoutingInvalid
from pipeline.routing import RowRouting, summarize_row

RETURNED = "returned"
"""Failure kind of a request that comes back to be sent again: it was recalled, or the replica drains."""


@dataclass(frozen=True)  # no slots here and in RowResult: they travel, see `engine`
class ReducedSample:
    """One sample as it travels: text and statistics, no per-token arrays unless asked for."""

    index: int
    text: str
    num_generated_tokens: int
    finish_reason: str
    stop_reason: str | None
    cumulative_logprob: float | None
    routing: RowRouting | None
    routing_invalid: bool
    expert_ids: bytes | None
    choice_logs: tuple[float, ...] | None = None
    """As in `engine.Sample`."""
    token_logs: tuple[TokenLog, ...] | None = None
    """As in `engine.Sample`."""


@dataclass(frozen=True)
class RowResult:
    """What became of one request: samples, or the failure of this attempt."""

    request_id: str
    samples: tuple[ReducedSample, ...] = ()
    num_cached_tokens: int = 0
    timing: Timing = UNKNOWN_TIMING
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Poll:
    """Answer to one poll: what finished since the last one, and a sign of life."""

    results: tuple[RowResult, ...]
    num_steps: int
    """Engine steps so far; a replica with work whose count stands still hangs."""
    in_company: bool = False
    """Whether the engine has requests of other consumers too, any of which may be what kills it."""
    pieces: tuple[Piece, ...] = ()
    """Of streamed requests, in order; they come before `results`."""
    num_running: int = 0
    """Requests that the engine has, everybody's."""
    num_waiting: int = 0
    """Requests that it hasn't got yet, everybody's."""
    is_first: bool = False
    """Whether the replica knows of no earlier poll of this consumer. To one that has polled before it says that it was
    taken for dead: what it had sent by then and isn't among `results` was given up."""


def failed(request_id: str, kind: str, message: str) -> RowResult:
    """An attempt's failure."""
    return RowResult(request_id, failure=Failure(request_id, kind, message))


def returned(request_id: str) -> RowResult:
    """A request that comes back to be sent again."""
    return failed(request_id, RETURNED, "not finished, and not at fault")


def reduce_sample(sample: Sample, num_prompt: int, moe: MoeShape | None, *, keep_ids: bool) -> ReducedSample:
    """Turn per-token expert ids into statistics; ids that break the rules null the routing and are flagged."""
    routing: RowRouting | None = None
    invalid = False
    ids: bytes | None = None
    if moe is not None:
        try:
            if sample.routed_experts is None:
                raise RoutingInvalid("the engine returned no routing")
            routing = summarize_row(sample.routed_experts, num_prompt, len(sample.token_ids), moe)
            if keep_ids:
                ids = sample.routed_experts.astype("uint8").tobytes()
        except RoutingInvalid:
            invalid = True
    return ReducedSample(
        index=sample.index,
        text=sample.text,
        num_generated_tokens=len(sample.token_ids),
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
        cumulative_logprob=sample.cumulative_logprob,
        routing=routing,
        routing_invalid=invalid,
        expert_ids=ids,
        choice_logs=sample.choice_logs,
        token_logs=sample.token_logs,
    )
