"""The Ray Data sink: one committed part per block, a block being a whole shard.

Only moves what `generate` built to where `parts` commits it; when some rows of a part are done again it lays them over
the part that is there. Invariant: running it twice for one shard leaves one part, equivalent to running it once.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
from ray.data.block import Block, BlockAccessor
from ray.data.datasource.datasink import Datasink

from pipeline.counters import RunCounters
from pipeline.errors import RETRYABLE_KINDS, InfrastructureError
from pipeline.generate import detach_counters
from pipeline.lease import current_owner
from pipeline.parts import PartFooter, commit_part, encode_part, read_footer, read_part
from pipeline.recount import kept_counters
from pipeline.shards import Plan
from pipeline.storage import Store

RETRY_AFTER_S = (1.0, 2.0, 4.0)
"""What is generated and paid for is put once more where the storage was away; longer, and the lease is lost anyway. A
client of an object store tries by itself for about 8 s each time."""
OVERLAID_BY = "overlaid_by"
"""Footer key of a part with rows that were done again: id of the sink that laid them over it."""


class PartSink(Datasink[None]):  # type: ignore[misc]  # Ray is untyped for mypy
    """Commits each shard as it arrives."""

    def __init__(
        self,
        store: Store,
        plan_ref: Any,
        monitor: Any,
        *,
        fingerprint: str,
        epoch: int | None,
        retried_statuses: Sequence[str] | None,
    ) -> None:
        super().__init__()
        self._store = store
        self._plan_ref = plan_ref
        self._monitor = monitor
        self._fingerprint = fingerprint
        self._epoch = epoch
        self._retried_statuses = retried_statuses
        """None when whole shards are written; else only rows of these statuses were done again."""
        self._id = uuid.uuid4().hex
        """The same in every task of one flow, since it travels with the sink; another in every other flow."""

    def get_name(self) -> str:
        """Name of the operator in Ray's logs."""
        return "Parts"

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:  # noqa: ARG002  Ray's signature
        """Commit every block that has rows; a shard that draining dropped has none."""
        for block in blocks:
            table = BlockAccessor.for_block(block).to_arrow()
            if table.num_rows:
                self._commit(table)

    def _commit(self, table: pa.Table) -> None:
        rows, shard, blob = detach_counters(table)
        counters = RunCounters.from_json_bytes(blob)
        num_rows = counters.totals.num_rows
        name = _plan(self._plan_ref).shard(shard).part_name
        extra = {"fingerprint": self._fingerprint}
        if self._retried_statuses is None:
            self._replace(name, rows, counters, extra)
        else:
            footer = read_footer(self._store, name)
            # Ray runs a task again whose process died between its commit and its report.
            if footer.extra.get(OVERLAID_BY) != self._id:
                laid_over = overlay(self._store, footer, rows, counters, self._retried_statuses)
                if laid_over is not None:
                    self._replace(name, *laid_over, extra | {OVERLAID_BY: self._id})
        self._monitor.note_commit.remote(shard, num_rows)

    def _replace(self, part_name: str, rows: pa.Table, counters: RunCounters, extra: dict[str, str]) -> None:
        data = encode_part(rows, counters.to_json_bytes(), extra)
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                self._check_ownership()  # last of all: encoding takes seconds, in which somebody may take over
                commit_part(self._store, part_name, data)
                return
            except (OSError, InfrastructureError) as error:
                if wait_s is None or not _may_pass(error):
                    raise
                time.sleep(wait_s)

    def _check_ownership(self) -> None:
        """Refuse to commit for a driver that was taken for dead: its parts may be older than those of its successor."""
        if self._epoch is None:
            return
        owner = current_owner(self._store)
        if owner is None or owner.epoch != self._epoch:
            raise InfrastructureError(
                f"{self._store.root} was taken over by {owner}; this run stops without touching it"
            )


def _may_pass(error: OSError | InfrastructureError) -> bool:
    """Whether the storage was away, rather than full, forbidden, or somebody else's."""
    return isinstance(error, ConnectionError | TimeoutError) or isinstance(
        error.__cause__, ConnectionError | TimeoutError
    )


def overlay(
    store: Store, footer: PartFooter, rows: pa.Table, counters: RunCounters, retried_statuses: Sequence[str]
) -> tuple[pa.Table, RunCounters] | None:
    """Put rows that were done again in the place of their old versions, in row and sample order.

    None when the part must stay as it is: a row that had an answer, if only a truncated one, has now failed for a
    reason that may pass, such as the loss of a node. To keep that answer alone won't do, since routing by layer is
    in the footer by status, not by row; so the whole part is left for the next retry.

    `footer` must have been read before: should another attempt at the same task commit in between, the rows to keep
    are the same ones, and an old footer still fits them where a new one would not.

    Raises:
        InfrastructureError: the rows to keep contradict `footer`, as when their part is laid over already.
    """
    import pyarrow.compute as pc

    old = read_part(store, footer.part_name)
    if loses_answers(old, rows):
        return None
    again = pc.is_in(old.column("input_row"), value_set=rows.column("input_row").combine_chunks())
    kept = old.filter(pc.invert(again))
    merged = pa.concat_tables([kept.cast(rows.schema), rows]).unify_dictionaries()
    merged = merged.sort_by([("input_row", "ascending"), ("sample_index", "ascending")])
    before = RunCounters.from_json_bytes(footer.counters)
    return merged, kept_counters(before, kept, retried_statuses=retried_statuses).merge(counters)


def loses_answers(old: pa.Table, rows: pa.Table) -> bool:
    """Whether a row of `rows` failed for a reason that may pass, of which `old` has a sample that isn't failed."""
    import pyarrow.compute as pc

    kinds = pa.array(sorted(RETRYABLE_KINDS), pa.string())
    failed = pc.is_in(pc.struct_field(rows["error"], "kind").cast(pa.string()), value_set=kinds)
    again = rows.filter(failed)["input_row"].combine_chunks()
    had_answer = pc.and_(
        pc.is_in(old["input_row"], value_set=again), pc.not_equal(old["status"].cast(pa.string()), "failed")
    )
    return bool(pc.any(had_answer).as_py())


@lru_cache(maxsize=4)
def _plan(plan_ref: Any) -> Plan:
    import ray

    plan: Plan = ray.get(plan_ref)
    return plan
