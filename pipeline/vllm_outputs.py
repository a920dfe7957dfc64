"""vLLM's finished requests in the pipeline's words. Takes vLLM's objects as they come and imports nothing of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.engine import Completion, Failure, Sample, Timing, TokenLog

LEAST_LOG = -9999.0
"""Instead of minus infinity, which JSON can't say; OpenAI's and vLLM's own number for it."""


def convert(output: Any, layers: Sequence[int], *, with_logs: bool = False) -> Completion | Failure:
    """What vLLM says of a finished request; `layers` are those that route, the others' ids are zeros and dropped.

    `with_logs`: take each token's log-probabilities along, if there are any.
    """
    bad = next((o for o in output.outputs if o.finish_reason not in ("stop", "length")), None)
    if bad is not None:
        return Failure(output.request_id, "request_error", f"the engine ended the request with {bad.finish_reason!r}")
    samples = tuple(_sample(o, layers, with_logs=with_logs) for o in sorted(output.outputs, key=lambda o: o.index))
    return Completion(output.request_id, samples, output.num_cached_tokens or 0, _timing(output.metrics))


def token_logs(output: Any) -> tuple[TokenLog, ...] | None:
    """Log-probabilities of an output's tokens; None when they weren't asked for."""
    if not output.logprobs:
        return None
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return tuple(_token_log(entries[token_id], entries.values()) for token_id, entries in pairs)


def _token_log(chosen: Any, entries: Iterable[Any]) -> TokenLog:
    # vLLM adds the chosen token to the likeliest, which it may not be one of; ranks tell.
    ranked = sorted((entry for entry in entries if entry.rank), key=lambda entry: entry.rank)
    top = tuple((entry.decoded_token or "", max(entry.logprob, LEAST_LOG)) for entry in ranked)
    return TokenLog(chosen.decoded_token or "", max(chosen.logprob, LEAST_LOG), top)


def _sample(output: Any, layers: Sequence[int], *, with_logs: bool) -> Sample:
    routed = getattr(output, "routed_experts", None)
    if routed is not None and routed.ndim == 3 and len(layers) < routed.shape[1]:
        routed = routed[:, layers]
    return Sample(
        index=output.index,
        text=output.text,
        token_ids=tuple(output.token_ids),
        finish_reason=output.finish_reason,
        stop_reason=None if output.stop_reason is None else str(output.stop_reason),
        cumulative_logprob=output.cumulative_logprob,
        routed_experts=routed,
        token_logs=token_logs(output) if with_logs else None,
    )


def _timing(metrics: Any) -> Timing:
    if metrics is None or not metrics.queued_ts:
        return Timing(0.0, 0.0, 0.0)
    queued = metrics.queued_ts  # the three stamps share one monotonic clock; arrival_time is wall clock
    return Timing(
        queue_s=max(0.0, metrics.scheduled_ts - queued),
        first_token_s=max(0.0, metrics.first_token_ts - queued),
        total_s=max(0.0, metrics.last_token_ts - queued),
    )
