"""The whole run on one page: read, template, generate, write.

Ray Data moves blocks, a block being a shard from end to end; the stage names here are the operator names in its logs.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from pipeline.cores import num_cores
from pipeline.datasink import PartSink
from pipeline.datasource import MAX_TASK_RETRIES, read_plan
from pipeline.errors import InfrastructureError
from pipeline.generate import DISPATCH_DIED, GenerateSettings, GenerateStage
from pipeline.open_rows import OpenRows
from pipeline.shards import Plan
from pipeline.storage import Store
from pipeline.templating import TemplateSettings, template_shard

# Deprecated in 2.60 without a successor that limits retries; pyproject.toml keeps Ray below 2.64, where it goes.
TASK_OPTIONS = {"max_retries": MAX_TASK_RETRIES}
warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")

MAX_TWIN_FACTOR = 4
"""Templated shards that may wait in the dispatch process, per shard that is begun where no two rows are equal."""


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

    Raises:
        InfrastructureError: the dispatch process died, or a task's process as often as tasks are tried.
        RayTaskError: whatever else a stage raised.
    """
    configure_ray_data()
    shard_rows = [len(rows[index]) if rows is not None else flow.plan.shard(index).num_rows for index in shards]
    here = {"label_selector": this_node()}
    dataset = _templated(flow, shards, rows, here).map_batches(
        GenerateStage,
        fn_constructor_args=(fleet, monitor, flow.generate),
        batch_size=None,
        batch_format="pyarrow",
        # Other resources than the stages before it, or Ray Data would fuse them into this one process.
        num_cpus=0,
        **here,  # it dies with no other node than the run does
        **generate_limits(flow, shard_rows),
    )
    sink = PartSink(
        flow.store,
        ray.put(flow.plan),
        monitor,
        fingerprint=flow.fingerprint,
        epoch=flow.epoch,
        retried_statuses=retried_statuses,
    )
    with _deaths_explained():
        # A local output is a folder of the driver's node.
        dataset.write_datasink(sink, ray_remote_args=TASK_OPTIONS | (here if flow.store.is_local else {}))


def _templated(
    flow: Flow, shards: Sequence[int], rows: Mapping[int, Sequence[int]] | None, here: Mapping[str, Any]
) -> ray.data.Dataset:
    """Reading and templating share a process, and the model's tokenizer and local inputs are on the driver's node."""
    readers = min(num_readers(), len(shards))
    dataset = read_plan(flow.plan, flow.user_schema, shards=shards, rows=rows, task_options=here, num_readers=readers)
    return dataset.map_batches(
        template_shard,
        fn_args=(flow.template,),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.TaskPoolStrategy(readers),
        **TASK_OPTIONS,
        **here,
    )


def give_up_flows(error: InfrastructureError) -> None:
    """Have every `run_flow` of this process raise the error soon, whatever Ray Data waits for.

    A thread of Ray Data's that still runs when Ray is shut down ends the process on the spot: exit code 1, no word
    said. Ray Data has no way of its own to cancel a dataset that is written.
    """
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            output = thread._output_node
            if output is not None:
                output[1].mark_finished(error)


def this_node() -> dict[str, str]:
    """Label selector of the node that the calling driver is on."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def num_readers() -> int:
    """Processes that read and template at once: half of what Ray gives the driver's node, and at least two.

    Unlimited, a small input took as many processes as the node has CPUs, at 2.2 s of processor time for each one's
    imports, while the engines were loading; and the writer had to wait for a slot.
    """
    node_id = ray.get_runtime_context().get_node_id()
    cpus = next(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == node_id)
    return max(2, min(int(cpus), num_cores()) // 2)  # a Ray of a run's own counts its replicas' CPUs on top


@contextmanager
def _deaths_explained() -> Iterator[None]:
    """Say which process died and what to do, where Ray shows its own frames and the id of an actor."""
    try:
        yield
    except RayTaskError:  # raised by our own code: it says what happened
        raise
    except RayActorError as error:
        if DISPATCH_DIED not in str(error):
            raise
        raise InfrastructureError(DISPATCH_DIED) from error
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise InfrastructureError(
            f"the process that read, templated or wrote a shard died {1 + MAX_TASK_RETRIES} times over, killed from "
            "outside or for lack of memory; what is committed is safe: rerun the same command"
        ) from error


def generate_limits(flow: Flow, shard_rows: Sequence[int]) -> dict[str, Any]:
    """How many shards are begun at once, as arguments of `map_batches`."""
    limits = OpenRows.of(flow.window, rows_per_shard=math.ceil(sum(shard_rows) / len(shard_rows)))
    # Rows that wait for a twin keep no engine busy, so that more shards may be needed to do that.
    calls = limits.num_calls(shard_rows, twin_factor=MAX_TWIN_FACTOR if flow.generate.dedupe else 1)
    return {
        "fn_constructor_kwargs": {"limits": limits},
        "compute": ray.data.ActorPoolStrategy(
            size=1, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=calls + 2
        ),
    }


def configure_ray_data() -> None:
    """Set what Ray Data 2.60's defaults get wrong for blocks that are shards and replicas that take minutes to load."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a task's output is one block: never split, never merged
    context.target_min_block_size = 0
    context.execution_options.preserve_order = False  # order would hold commits back behind stragglers
    context.execution_no_progress_timeout_s = -1  # waiting for GPUs isn't a failure; the fleet watches
    context.raise_original_map_exception = True  # wrapped in Ray Data's own, ours would lose its words on the way
    context.max_errored_blocks = 0  # rows fail in columns; an error here is ours and must be seen
    context.issue_detectors_config.detectors = []
    context.memory_usage_poll_interval_s = None  # else a thread for each open shard reads /proc every second
    context.enable_progress_bars = False
    context.print_on_execution_start = False
