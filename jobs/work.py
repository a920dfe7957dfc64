"""What one execution has to do: missing shards, and rows of committed parts that are to be done again.

Decides from footers and the parts it names; starts nothing and writes nothing. Invariant: a part whose statistics could
not be carried over is refused here, before anything is spent on its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.prepare import PreparedJob
from pipeline.counters import RunCounters
from pipeline.errors import RETRYABLE_KINDS, InfrastructureError, SpecError
from pipeline.ledger import Ledger
from pipeline.parts import open_part, part_sizes
from pipeline.recount import ROW_COLUMNS, kept_counters, routing_pieces
from pipeline.row_picks import PickedRows
from pipeline.shards import Shard
from pipeline.storage import Store

# Object stores answer a part's four requests one after the other, so waiting is most of it. 200 local parts of 256 rows
# with Mixtral 8x7B's routing take 0.8 s and 95 MiB on two cores, 12 parts of 4,096 rows 0.4 s and 125 MiB.
_PART_THREADS = 8


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows of committed parts to do again."""

    statuses: tuple[str, ...]
    """An input row is chosen when any of its samples has one of these."""
    kinds: frozenset[str] | None
    """And one of these error kinds; None for any or none."""

    def rows_of(self, table: pa.Table) -> PickedRows:
        """Numbers of the chosen input rows of a part (columns `status`, `error.kind`, `input_row`)."""
        chosen = pc.is_in(table["status"].cast(pa.string()), value_set=pa.array(self.statuses, pa.string()))
        if self.kinds is not None:
            kind = pc.struct_field(table["error"], "kind")
            chosen = pc.and_(chosen, pc.is_in(kind, value_set=pa.array(sorted(self.kinds), pa.string())))
        return PickedRows.of(table["input_row"].filter(chosen).to_numpy())


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to treat what is there."""

    retry_failed: bool = True
    """Do rows again that failed in an earlier execution for reasons that may have passed."""
    only_failed: bool = False
    """Do nothing but that, and for rows that failed for whatever reason."""
    statuses: tuple[str, ...] = ("failed",)
    """Which rows a retry does again."""
    kinds: tuple[str, ...] | None = None
    """Only failed rows with these error kinds; None for any."""
    accept_changes: bool = False
    """Of an incremental job: go on with other settings than those of the runs before."""
    quiet: bool = False
    ray: str | None = None
    """Address of the Ray cluster to work in; None for a Ray of the run's own on this machine."""
    run_id: str | None = None
    """What this execution is called; None for eight random digits."""

    @property
    def selection(self) -> Selection | None:
        """Rows of committed parts to do again; None for none."""
        if not (self.only_failed or self.retry_failed):
            return None
        if self.kinds is not None:
            return Selection(self.statuses, frozenset(self.kinds))
        return Selection(self.statuses, None if self.only_failed else RETRYABLE_KINDS)


@dataclass(frozen=True, slots=True)
class Work:
    """What one execution has to do."""

    shards: tuple[int, ...]
    """Not committed yet."""
    rows: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Shard -> the only rows of it to do, as row numbers within the file. A million single numbers are 40 MB in the
    driver; a bit for each row of the shards that have any, as `find_work` gives them, is at most 0.2 MB."""
    retried_statuses: tuple[str, ...] | None = None
    """Statuses that `rows` had in parts that are there; None when there are no such parts."""

    @property
    def num_single_rows(self) -> int:
        """Rows to do outside of whole shards."""
        return sum(map(len, self.rows.values()))

    def num_rows(self, job: PreparedJob) -> int:
        """Rows that an engine will see."""
        return sum(job.plan.shard(index).num_rows for index in self.shards) + self.num_single_rows


def find_work(ledger: Ledger, job: PreparedJob, options: RunOptions) -> tuple[Work, RunCounters]:
    """Which shards are missing, which rows of committed parts to do again, and the counters of what is committed.

    Raises:
        SpecError: only a retry is wanted, but the run isn't complete.
        InfrastructureError: a part to retry is damaged, or contradicts its own statistics.
    """
    if options.only_failed:
        refuse_unfinished(ledger)
    shards = tuple(ledger.todo())
    selection = options.selection
    if selection is None:
        return Work(shards), ledger.totals()
    survey = ledger.survey(statuses=selection.statuses, kinds=selection.kinds)
    rows = find_rows(ledger.store, survey.chosen, selection, routing=job.moe is not None)
    return Work(shards, rows, selection.statuses if rows else None), survey.totals


def refuse_unfinished(ledger: Ledger) -> None:
    """Raise SpecError when rows have no result yet: a retry then waits for `run`."""
    missing = sum(ledger.plan.shard(index).num_rows for index in ledger.todo())
    if missing:
        raise SpecError(
            f"{missing:,} of {ledger.plan.num_rows:,} rows have no result yet in {ledger.store.root}; "
            "a retry is for finished runs: `tramontane run` does the missing rows first"
        )


def find_rows(
    store: Store, parts: Mapping[int, Shard], selection: Selection, *, routing: bool
) -> dict[int, PickedRows]:
    """Shard index -> the chosen rows of its part, in plan order; parts without any are left out.

    Looks at a few parts at a time, and only at the columns that say which rows and check the statistics of the others.

    Raises:
        InfrastructureError: see `rows_to_retry`; the first such part in plan order is named.
    """
    if not parts:
        return {}
    look = partial(rows_to_retry, store, selection=selection, routing=routing, sizes=part_sizes(store))
    with ThreadPoolExecutor(_PART_THREADS, thread_name_prefix="retry") as pool:
        found = zip(parts, pool.map(look, [shard.part_name for shard in parts.values()]), strict=True)
        return {index: rows for index, rows in found if rows}


def rows_to_retry(
    store: Store, part_name: str, *, selection: Selection, routing: bool, sizes: Mapping[str, int]
) -> PickedRows:
    """Rows of a part that are chosen.

    Raises:
        InfrastructureError: the part is damaged, or the rows left alone contradict the footer's counters, so that a new
            footer could not be made.
    """
    part = open_part(store, part_name, size=sizes.get(part_name))
    table = part.read(ROW_COLUMNS)
    rows = selection.rows_of(table)
    if not rows:
        return rows
    try:
        kept_counters(
            RunCounters.from_json_bytes(part.footer.counters),
            table,
            retried_statuses=selection.statuses,
            keep=~np.isin(table["input_row"].to_numpy(), rows.numbers()),
            routing=routing_pieces(part, recorded=routing),
        )
    except InfrastructureError as error:
        if part_name in error.message:
            raise
        raise InfrastructureError(f"part {part_name} in {store.root}: {error.message}") from error
    return rows
