"""An endpoint's figures as Prometheus reads them: requests, times, tokens, replicas, and how experts are used.

Invariant: labels take values from fixed lists or from the fleet, never from a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from cluster.serve_prompts import Asked
from pipeline.engine import MoeShape
from pipeline.replica_answers import RowResult
from pipeline.routing_measures import normalised_entropy, shares_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """All figures of one endpoint since it started."""

    def __init__(self, replica_loads: Callable[[], dict[str, tuple[int, int]]], moe: MoeShape | None) -> None:
        """`moe`: shape of the routing that the engines capture."""
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tramontane_requests", "HTTP requests that were answered.", ["route", "code"], registry=self._registry
        )
        self._broken = Counter(
            "tramontane_streams_broken", "Streams that ended in an error event.", ["code"], registry=self._registry
        )
        self._hung_up = Counter("tramontane_hang_ups", "Clients that didn't wait.", registry=self._registry)
        self._queue = self._histogram("queue", "From a request's arrival until an engine began it.")
        self._first = self._histogram("first_token", "From a request's arrival to its first token.")
        self._total = self._histogram("total", "From a request's arrival to its last token.")
        self._tokens = Counter(
            "tramontane_tokens",
            "Tokens in and out, of answers that were given whole.",
            ["direction"],
            registry=self._registry,
        )
        self._load = _Load(replica_loads, moe)
        self._registry.register(self._load)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"tramontane_{name}_seconds", text, registry=self._registry, buckets=_SECONDS)

    def answered(self, route: str, code: int) -> None:
        """Count an HTTP answer."""
        self._requests.labels(route, str(code)).inc()

    def broken(self, code: int) -> None:
        """Count a stream that ended in an error event."""
        self._broken.labels(str(code)).inc()

    def hung_up(self) -> None:
        """Count a client that didn't wait for its answer."""
        self._hung_up.inc()

    def generated(
        self, asked: Asked, results: Sequence[RowResult], *, took_s: float, first_s: float | None = None
    ) -> None:
        """Count what was generated; `first_s` is when a stream's first piece came, seconds after the arrival."""
        before_s = max(0.0, took_s - max(result.timing.total_s for result in results))
        timing = results[0].timing
        self._queue.observe(before_s + timing.queue_s)
        self._first.observe(before_s + timing.first_token_s if first_s is None else first_s)
        self._total.observe(took_s)
        self._tokens.labels("in").inc(sum(len(request.prompt_token_ids) for request in asked.requests))
        samples = [sample for result in results for sample in result.samples]
        self._tokens.labels("out").inc(sum(sample.num_generated_tokens for sample in samples))
        for sample in samples:
            if sample.routing is not None:
                self._load.add(sample.routing.prompt_counts, sample.routing.completion_counts)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Load:
    """What is read off at the moment when somebody asks."""

    def __init__(self, replica_loads: Callable[[], dict[str, tuple[int, int]]], moe: MoeShape | None) -> None:
        self._replica_loads = replica_loads
        self._moe = moe
        self._counts = np.zeros((moe.num_layers, moe.num_experts) if moe else (0, 0), np.uint64)

    def add(self, *counts: Any) -> None:
        for each in counts:
            self._counts += each.reshape(self._counts.shape)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running = GaugeMetricFamily("tramontane_requests_running", "Requests that engines have.", labels=["replica"])
        waiting = GaugeMetricFamily("tramontane_requests_waiting", "Requests before engines.", labels=["replica"])
        for replica, (num_running, num_waiting) in self._replica_loads().items():
            running.add_metric([replica], num_running)
            waiting.add_metric([replica], num_waiting)
        yield from (running, waiting)
        if self._counts.any():
            yield from self._experts()

    def _experts(self) -> Iterator[GaugeMetricFamily]:
        share = GaugeMetricFamily(
            "tramontane_expert_share", "Share of a layer's selections, online requests.", labels=["layer", "expert"]
        )
        entropy = GaugeMetricFamily(
            "tramontane_expert_entropy", "Of a layer's shares, normalised: 1 is even use.", labels=["layer"]
        )
        for layer, (shares, evenness) in enumerate(
            zip(shares_of(self._counts), normalised_entropy(self._counts), strict=True)
        ):
            for expert, part in enumerate(shares):
                share.add_metric([str(layer), str(expert)], float(part))
            entropy.add_metric([str(layer)], float(evenness))
        yield from (share, entropy)
