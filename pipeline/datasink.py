"""The Ray Data sink: one committed part per block, a block being a whole shard.

Only moves what `generate` built to where `parts` commits it; when some rows of a part are done again it lays them over
the part that is there. Invariant: running it twice for one shard leaves one part, equivalent to running it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
from ray.data.block import Block, BlockAccessor
from ray.data.datasource.datasink import Datasink

from pipeline.counters import RunCounters
from pipeline.errors import InfrastructureError
from pipeline.generate import detach_counters
from pipeline.lease import current_owner
from pipeline.parts import commit_part, encode_part, read_footer, read_part
from pipeline.recount import kept_counters
from pipeline.shards import Plan
from pipeline.storage import Store


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
        name = _plan(self._plan_ref).shard(shard).part_name
        counters = RunCounters.from_json_bytes(blob)
        if self._retried_statuses is not None:
            rows, counters = overlay(self._store, name, rows, counters, self._retried_statuses)
        self._check_ownership()
        commit_part(self._store, name, encode_part(rows, counters.to_json_bytes(), {"fingerprint": self._fingerprint}))
        self._monitor.note_commit.remote(shard)

    def _check_ownership(self) -> None:
        """Refuse to commit for a driver that was taken for dead: its parts may be older than those of its successor."""
        if self._epoch is None:
            return
        owner = current_owner(self._store)
        if owner is None or owner.epoch != self._epoch:
            raise InfrastructureError(
                f"{self._store.root} was taken over by {owner}; this run stops without touching it"
            )


def overlay(
    store: Store, part_name: str, rows: pa.Table, counters: RunCounters, retried_statuses: Sequence[str]
) -> tuple[pa.Table, RunCounters]:
    """Put rows that were done again in the place of their old versions, in row and sample order."""
    import pyarrow.compute as pc

    old = read_part(store, part_name)
    footer = RunCounters.from_json_bytes(read_footer(store, part_name).counters)
    again = pc.is_in(old.column("input_row"), value_set=rows.column("input_row").combine_chunks())
    kept = old.filter(pc.invert(again))
    merged = pa.concat_tables([kept.cast(rows.schema), rows]).unify_dictionaries()
    merged = merged.sort_by([("input_row", "ascending"), ("sample_index", "ascending")])
    return merged, kept_counters(footer, kept, retried_statuses=retried_statuses).merge(counters)


@lru_cache(maxsize=4)
def _plan(plan_ref: Any) -> Plan:
    import ray

    plan: Plan = ray.get(plan_ref)
    return plan
