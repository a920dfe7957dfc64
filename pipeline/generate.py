"""The Ray Data stage that turns a shard of prompts into a shard of results: a thin async shell around the dispatcher.

Ray Data hands it one block per shard and calls it for many shards at once. Rows fail in columns; what it raises ends
the run.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from pipeline.dispatcher import Dispatcher, Outcome
from pipeline.engine import MoeShape, Request
from pipeline.errors import InfrastructureError
from pipeline.monitor import Figures
from pipeline.results import ResultBuilder
from pipeline.rows import ERROR, FILE, PROMPT_IDS, ROW, SAMPLING, SHARD
from pipeline.sampling import row_seed, sampling_from_json
from pipeline.settings import LimitSettings, RoutingSettings, SamplingSettings

COUNTERS = "_tm_counters"
"""Column that carries the shard's counters to the writer: in its first row, null in the others."""
POST_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """What the stage needs to know of a run; picklable."""

    seed: int
    input_root: str
    """Folder of all input files; seeds depend on paths below it, so that moving the whole input changes nothing."""
    schema: pa.Schema
    routing: RoutingSettings
    limits: LimitSettings
    moe: MoeShape | None


class GenerateStage:
    """One instance per run serves all shards, so that one dispatch board sees all rows."""

    def __init__(self, fleet: Any, monitor: Any, settings: GenerateSettings) -> None:
        if _is_second_life():
            raise InfrastructureError("the dispatch process died; what is committed is safe: rerun the same command")
        self._settings = settings
        self._builder = ResultBuilder(settings.schema, settings.routing, settings.moe)
        self._figures = Figures()
        self._name = uuid.uuid4().hex
        self._stopped = False
        self._monitor = monitor
        self._poster: asyncio.Task[None] | None = None
        self._dispatcher = Dispatcher(
            fleet,
            max_attempts=settings.limits.max_attempts,
            hang_timeout_s=settings.limits.hang_timeout_s,
            on_outcome=self._count,
        )

    async def __call__(self, prompts: pa.Table) -> pa.Table:
        """Return the shard's output rows and counters; an empty table when draining dropped the shard."""
        if self._poster is None:
            self._poster = asyncio.get_running_loop().create_task(self._post())
        if self._stopped:
            raise InfrastructureError("the flow was told to stop; nothing of it was left to do")
        self._figures.shards_open += 1
        try:
            return await self._generate(prompts)
        finally:
            self._figures.shards_open -= 1

    async def _generate(self, prompts: pa.Table) -> pa.Table:
        requests = shard_requests(prompts, self._settings)
        outcomes = await self._dispatcher.generate(requests)
        if outcomes is None:
            return attach_counters(self._settings.schema.empty_table(), 0, b"")
        self._figures.shards_done += 1
        unsent = sum(request is None for request in requests)
        self._figures.rows_done += unsent
        self._figures.rows_failed += unsent
        table, counters = self._builder.build(prompts, outcomes)
        await self._monitor.post.remote(self._name, self._figures)  # so that after the last shard the figures are exact
        return attach_counters(table, prompts.column(SHARD)[0].as_py(), counters.to_json_bytes())

    def _count(self, request: Request, outcome: Outcome) -> None:
        self._figures.rows_done += 1
        self._figures.input_tokens += len(request.prompt_token_ids)
        self._figures.rows_failed += outcome.result.failure is not None
        self._figures.generated_tokens += sum(sample.num_generated_tokens for sample in outcome.result.samples)

    async def _post(self) -> None:
        while True:
            self._figures.rows_in_flight = self._dispatcher.num_in_flight
            self._figures.replicas_up = self._dispatcher.num_replicas
            order = await self._monitor.post.remote(self._name, self._figures)
            self._figures.draining = order != "run"
            self._stopped = order == "stop"
            if order == "drain":
                self._dispatcher.drain()
            elif order == "abandon":
                self._dispatcher.abandon()
            await asyncio.sleep(POST_INTERVAL_S)


def _is_second_life() -> bool:
    """Whether Ray restarted this actor. It would replay all open shards, and for ever if they are what killed it."""
    import ray

    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def shard_requests(prompts: pa.Table, settings: GenerateSettings) -> list[Request | None]:
    """One request per row that templating let through, None for the others; request ids are dispatch's to give."""
    ids = prompts.column(PROMPT_IDS).to_pylist()
    sampling = prompts.column(SAMPLING).to_pylist()
    errors = prompts.column(ERROR).is_null().to_pylist()
    rows = prompts.column(ROW).to_pylist()
    file = prompts.column(FILE)[0].as_py().removeprefix(settings.input_root)  # a shard never crosses a file
    return [
        _request(row_ids, _sampling(row_sampling), settings.seed, file, row) if sound else None
        for row_ids, row_sampling, sound, row in zip(ids, sampling, errors, rows, strict=True)
    ]


def attach_counters(table: pa.Table, shard: int, counters: bytes) -> pa.Table:
    """Add the internal columns by which a block tells the writer its shard and its counters."""
    blobs = [counters, *[None] * (table.num_rows - 1)] if table.num_rows else []
    shards = pa.array([shard] * table.num_rows, pa.int32())
    return table.append_column(SHARD, shards).append_column(COUNTERS, pa.array(blobs, pa.binary()))


def detach_counters(table: pa.Table) -> tuple[pa.Table, int, bytes]:
    """Undo `attach_counters` on a table that has rows."""
    shard, counters = table.column(SHARD)[0].as_py(), table.column(COUNTERS)[0].as_py()
    return table.drop_columns([SHARD, COUNTERS]), shard, counters


def _request(ids: list[int], sampling: SamplingSettings, seed: int, file: str, row: int) -> Request:
    base = seed if sampling.seed is None else sampling.seed  # a row may bring its own
    return Request("", ids, sampling, row_seed(base, file, row))


_sampling = lru_cache(maxsize=1024)(sampling_from_json)
