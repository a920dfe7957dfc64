"""The whole run on one page: read, template, generate, write.

Ray Data moves blocks, a block being a shard from end to end; the stage names here are the operator names in its logs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline.datasink import PartSink
from pipeline.datasource import MAX_TASK_RETRIES, read_plan
from pipeline.generate import GenerateSettings, GenerateStage
from pipeline.shards import Plan
from pipeline.storage import Store
from pipeline.templating import TemplateSettings, template_shard

# Deprecated in 2.60 without a successor that limits retries; pyproject.toml keeps Ray below 2.64, where it goes.
TASK_OPTIONS = {"max_retries": MAX_TASK_RETRIES}
warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")


@dataclass(frozen=True, slots=True)
class Flow:
    """Everything a run's data path is made of."""

    plan: Plan
    user_schema: pa.Schema
    """One schema for the user's columns of all files, as read."""
    template: TemplateSettings
    generate: GenerateSettings
    store: Store
    fingerprint: str
    epoch: int | None
    """Ownership of the output under which parts may be committed; None when nobody else can know the output."""
    window: int
    """Unfinished rows that all replicas together can hold."""


def run_flow(
    flow: Flow,
    shards: Sequence[int],
    *,
    fleet: Any,
    monitor: Any,
    rows: Mapping[int, Sequence[int]] | None = None,
    retried_statuses: Sequence[str] | None = None,
) -> None:
    """Bring these shards of the plan to committed parts; returns when all are, or were dropped by an order to drain.

    With `rows`, only these rows of each shard are done, and laid over the part that is there.
    """
    configure_ray_data()
    plan_ref = ray.put(flow.plan)
    sent = sum(map(len, rows.values())) if rows is not None else flow.plan.rows_per_shard * len(shards)
    open_shards = num_open_shards(flow.window, max(1, sent // len(shards)))
    dataset = read_plan(flow.plan, flow.user_schema, shards=shards, rows=rows)
    dataset = dataset.map_batches(
        template_shard,
        fn_args=(flow.template,),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        **TASK_OPTIONS,
    )
    dataset = dataset.map_batches(
        GenerateStage,
        fn_constructor_args=(fleet, monitor, flow.generate),
        batch_size=None,
        batch_format="pyarrow",
        # Other resources than the stages before it, or Ray Data would fuse them into this one process.
        num_cpus=0,
        compute=ray.data.ActorPoolStrategy(
            size=1, max_concurrent_calls_per_actor=open_shards, max_tasks_in_flight_per_actor=open_shards + 2
        ),
    )
    sink = PartSink(
        flow.store,
        plan_ref,
        monitor,
        fingerprint=flow.fingerprint,
        epoch=flow.epoch,
        retried_statuses=retried_statuses,
    )
    dataset.write_datasink(sink, ray_remote_args=TASK_OPTIONS)


def num_open_shards(window: int, rows_per_shard: int) -> int:
    """Shards to generate at once: enough rows to fill the window while some shards wait for their last rows.

    Every open shard is lost when the driver is killed, so no more than needed.
    """
    return math.ceil(1.5 * window / rows_per_shard) + 2


def configure_ray_data() -> None:
    """Set what Ray Data 2.60's defaults get wrong for blocks that are shards and replicas that take minutes to load."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a task's output is one block: never split, never merged
    context.target_min_block_size = 0
    context.execution_options.preserve_order = False  # order would hold commits back behind stragglers
    context.execution_no_progress_timeout_s = -1  # waiting for GPUs isn't a failure; the fleet watches
    context.max_errored_blocks = 0  # rows fail in columns; an error here is ours and must be seen
    context.issue_detectors_config.detectors = []
    context.enable_progress_bars = False
    context.print_on_execution_start = False
