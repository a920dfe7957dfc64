"""The Ray Data stage that turns a shard of prompts into a shard of results: a thin async shell around the dispatcher.

Ray Data hands it one block per shard and calls it for many shards at once. Rows fail in columns; what it raises ends
the run.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.choices import ChoiceTree
from pipeline.dispatcher import Dispatcher
from pipeline.engine import MoeShape, Request, TokenIds
from pipeline.errors import InfrastructureError
from pipeline.labels import LabelRule
from pipeline.monitor import Figures, Order
from pipeline.multi_labels import MultiLabelRule
from pipeline.open_rows import OpenRows
from pipeline.outcomes import Outcome
from pipeline.results import ResultBuilder
from pipeline.rows import ERROR, FILE, PROMPT_IDS, ROW, SHARD, sampling_texts
from pipeline.sampling import is_greedy, row_seed, sampling_from_json
from pipeline.settings import LimitSettings, RoutingSettings, SamplingSettings
from pipeline.twins import request_digest

COUNTERS = "_tm_counters"
"""Column that carries the shard's counters to the writer: in its first row, null in the others."""
POST_INTERVAL_S = 0.5
DISPATCH_DIED = (
    "the dispatch process died, killed from outside or for lack of memory; what is committed is safe: "
    "rerun the same command"
)


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
    priority: int = 0
    """Of all requests, on replicas that other runs use too; lower runs first."""
    choices: ChoiceTree | None = None
    """Of a labelling job: answers to choose among instead of generating."""
    dedupe: bool = True
    """Run equal requests once when their outcome depends on nothing else."""
    labels: LabelRule | MultiLabelRule | None = None


class GenerateStage:
    """One instance per run serves all shards, so that one dispatch board sees all rows."""

    def __init__(self, fleet: Any, monitor: Any, settings: GenerateSettings, *, limits: OpenRows) -> None:
        if _is_second_life():
            monitor.note_dispatch_death.remote()
            raise InfrastructureError(DISPATCH_DIED)
        self._limits = limits
        self._settings = settings
        self._builder = ResultBuilder(settings.schema, settings.routing, settings.moe, settings.labels)
        self._figures = Figures()
        self._name = uuid.uuid4().hex
        self._stopped = False
        self._committed_rows = 0
        self._heard = asyncio.Condition()
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
        async with self._heard:
            await self._heard.wait_for(self._may_begin)
            self._figures.shards_open += 1
        try:
            if self._stopped:
                raise InfrastructureError("the flow was told to stop; nothing of it was left to do")
            return await self._generate(prompts)
        finally:
            self._figures.shards_open -= 1

    def _may_begin(self) -> bool:
        """Whether another shard may be begun: what is begun and not committed is lost with the driver."""
        if self._figures.draining or self._poster is None or self._poster.done():  # done: the run has ended without us
            return True
        if self._dispatcher.has_failed:
            return True
        return self._limits.allow(
            unfinished=self._dispatcher.num_unfinished,
            begun=self._dispatcher.num_open_rows,
            uncommitted=self._figures.rows_handed_on - self._committed_rows,
            looks_ahead=self._dispatcher.wants_more,
        )

    async def _generate(self, prompts: pa.Table) -> pa.Table:
        requests = shard_requests(prompts, self._settings)
        outcomes = await self._dispatcher.generate(requests, self._digests(prompts, requests))
        if outcomes is None:
            return attach_counters(self._settings.schema.empty_table(), 0, b"")
        self._figures.shards_done += 1
        self._figures.rows_handed_on += prompts.num_rows
        unsent = sum(request is None for request in requests)
        self._figures.rows_done += unsent
        self._figures.rows_failed += unsent
        # A schema's check of 16,000 samples takes 15 s, for which nobody would be sent or told anything.
        table, counters = await asyncio.to_thread(self._builder.build, prompts, outcomes)
        await self._tell()  # so that after the last shard the figures are exact
        return attach_counters(table, prompts.column(SHARD)[0].as_py(), counters.to_json_bytes())

    def _digests(self, prompts: pa.Table, requests: list[Request | None]) -> list[bytes | None] | None:
        if not self._settings.dedupe:
            return None
        return [
            request_digest(one.prompt_token_ids, text or "") if one and depends_on_nothing_else(one) else None
            for one, text in zip(requests, sampling_texts(prompts), strict=True)
        ]

    def _count(self, request: Request, outcome: Outcome) -> None:
        figures, num_input = self._figures, len(request.prompt_token_ids)
        num_generated = sum(sample.num_generated_tokens for sample in outcome.result.samples)
        figures.rows_done += 1
        figures.rows_failed += outcome.result.failure is not None
        if outcome.copied:
            figures.copied_rows += 1
            figures.copied_input_tokens += num_input
            figures.copied_generated_tokens += num_generated
        else:
            figures.input_tokens += num_input
            figures.generated_tokens += num_generated

    async def _post(self) -> None:
        try:
            await self._keep_posting()
        finally:
            async with self._heard:
                self._heard.notify_all()

    async def _keep_posting(self) -> None:
        while True:
            self._figures.rows_in_flight = self._dispatcher.num_in_flight
            self._figures.replicas_up = self._dispatcher.num_replicas
            order = await self._tell()
            self._figures.draining = order != "run"
            self._stopped = order == "stop"
            if order == "drain":
                self._dispatcher.drain()
            elif order == "abandon":
                self._dispatcher.abandon()
            async with self._heard:
                self._heard.notify_all()
            await asyncio.sleep(POST_INTERVAL_S)

    async def _tell(self) -> Order:
        order: Order
        order, committed_rows = await self._monitor.post.remote(self._name, self._figures)
        self._committed_rows = max(self._committed_rows, committed_rows)
        async with self._heard:
            self._heard.notify_all()
        return order


def _is_second_life() -> bool:
    """Whether Ray restarted this actor. It would replay all open shards, and for ever if they are what killed it.

    Forbidding the restart instead (`max_restarts=0`) left Ray Data 2.60 waiting for the dead actor's shards for ever in
    2 of 8 trials; refused here, the run ended within 4 to 16 s in 12 of 12.
    """
    import ray

    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.worker.mode == ray.WORKER_MODE and bool(context.was_current_actor_reconstructed)


def shard_requests(prompts: pa.Table, settings: GenerateSettings) -> list[Request | None]:
    """One request per row that templating let through, None for the others; request ids are dispatch's to give."""
    ids = _views(prompts.column(PROMPT_IDS))
    sampling = sampling_texts(prompts)
    errors = prompts.column(ERROR).is_null().to_pylist()
    rows = prompts.column(ROW).to_pylist()
    file = prompts.column(FILE)[0].as_py().removeprefix(settings.input_root)  # a shard never crosses a file
    return [
        _request(row_ids, sampling_from_json(row_sampling or ""), settings, file, row) if sound else None
        for row_ids, row_sampling, sound, row in zip(ids, sampling, errors, rows, strict=True)
    ]


def _views(lists: pa.ChunkedArray) -> list[NDArray[np.int32]]:
    """Each row's token ids, where they lie in the table if that is of one piece; those of a null are empty."""
    whole = lists.chunk(0) if lists.num_chunks == 1 else lists.combine_chunks()
    offsets, values = whole.offsets.to_numpy(), whole.values.to_numpy()
    return [values[start:end] for start, end in itertools.pairwise(offsets)]


def depends_on_nothing_else(request: Request) -> bool:
    """Whether an equal prompt with equal sampling has the same outcome: nothing is drawn at random."""
    return request.choices is not None or is_greedy(request.sampling)


def attach_counters(table: pa.Table, shard: int, counters: bytes) -> pa.Table:
    """Add the internal columns by which a block tells the writer its shard and its counters."""
    blobs = [counters, *[None] * (table.num_rows - 1)] if table.num_rows else []
    shards = pa.array([shard] * table.num_rows, pa.int32())
    return table.append_column(SHARD, shards).append_column(COUNTERS, pa.array(blobs, pa.binary()))


def detach_counters(table: pa.Table) -> tuple[pa.Table, int, bytes]:
    """Undo `attach_counters` on a table that has rows."""
    shard, counters = table.column(SHARD)[0].as_py(), table.column(COUNTERS)[0].as_py()
    return table.drop_columns([SHARD, COUNTERS]), shard, counters


def _request(ids: TokenIds, sampling: SamplingSettings, settings: GenerateSettings, file: str, row: int) -> Request:
    base = settings.seed if sampling.seed is None else sampling.seed  # a row may bring its own
    return Request(
        request_id="",
        prompt_token_ids=ids,
        sampling=sampling,
        seed=row_seed(base, file, row),
        priority=settings.priority,
        timeout_s=settings.limits.request_timeout_s,
        keep_expert_ids=settings.routing.level == "tokens",
        choices=settings.choices,
    )
