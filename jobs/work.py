"""What one execution has to do: missing shards, and rows of committed parts that are to be done again.

Decides from footers and the parts it names; starts nothing and writes nothing. Invariant: a part whose statistics could
not be carried over is refused here, before anything is spent on its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.prepare import PreparedJob
from pipeline.counters import RunCounters
from pipeline.errors import RETRYABLE_KINDS, InfrastructureError, SpecError
from pipeline.ledger import Ledger
from pipeline.parts import read_part
from pipeline.recount import kept_counters
from pipeline.storage import Store


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
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What one execution has to do."""

    shards: tuple[int, ...]
    """Not committed yet."""
    rows: dict[int, list[int]] = field(default_factory=dict)
    """Shard -> the only rows of it to do, as row numbers within the file."""
    retried_statuses: tuple[str, ...] | None = None
    """Statuses that `rows` had in parts that are there; None when there are no such parts."""

    @property
    def num_single_rows(self) -> int:
        """Rows to do outside of whole shards."""
        return sum(map(len, self.rows.values()))

    def num_rows(self, job: PreparedJob) -> int:
        """Rows that an engine will see."""
        return sum(job.plan.shard(index).num_rows for index in self.shards) + self.num_single_rows


def find_work(ledger: Ledger, job: PreparedJob, before: RunCounters, options: RunOptions) -> Work:
    """Which shards are missing, and which rows of committed parts to do again.

    Raises:
        SpecError: only a retry is wanted, but the run isn't complete, or kinds are given for rows that have none.
        InfrastructureError: a part to retry is damaged, or contradicts its own statistics.
    """
    shards = tuple(ledger.todo())
    if options.only_failed:
        _check_retry(ledger, job, before, options)
    elif not options.retry_failed:
        return Work(shards)
    kinds: Sequence[str] | None = options.kinds
    if kinds is None and not options.only_failed:
        kinds = sorted(RETRYABLE_KINDS)
    if not any(before.totals.samples.get(status, 0) for status in options.statuses):
        return Work(shards)
    retry: dict[int, list[int]] = {}
    for index, footer in ledger.failed_parts(statuses=options.statuses, kinds=kinds).items():
        counters = RunCounters.from_json_bytes(footer.counters)
        rows = rows_to_retry(ledger.store, footer.part_name, counters, options.statuses, kinds)
        if rows:
            retry[index] = rows
    return Work(shards, retry, options.statuses)


def _check_retry(ledger: Ledger, job: PreparedJob, before: RunCounters, options: RunOptions) -> None:
    missing = job.plan.num_rows - before.totals.num_rows
    if missing:
        raise SpecError(
            f"{missing:,} of {job.plan.num_rows:,} rows have no result yet in {ledger.store.root}; "
            "a retry is for finished runs: `tramontane run` does the missing rows first"
        )
    others = [status for status in options.statuses if status != "failed"]
    if options.kinds and others:
        raise SpecError(
            f"--kind {options.kinds[0]} chooses among failed rows, but --status {others[0]} has no kinds; "
            "give one of the two, or retry twice"
        )


def rows_to_retry(
    store: Store, part_name: str, counters: RunCounters, statuses: Sequence[str], kinds: Sequence[str] | None
) -> list[int]:
    """Rows of a part of which any sample has one of these statuses and, if given, error kinds; in order.

    Raises:
        InfrastructureError: the rows left alone contradict the footer's counters, so a new footer could not be made.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = read_part(store, part_name)
    wanted = pc.is_in(table.column("status").cast(pa.string()), value_set=pa.array(list(statuses), pa.string()))
    if kinds is not None:
        kind = pc.struct_field(table.column("error"), "kind")
        wanted = pc.and_(wanted, pc.fill_null(pc.is_in(kind, value_set=pa.array(list(kinds), pa.string())), False))  # noqa: FBT003
    rows = sorted(set(table.filter(wanted).column("input_row").to_pylist()))
    again = pc.is_in(table.column("input_row"), value_set=pa.array(rows, pa.int64()))
    try:
        kept_counters(counters, table.filter(pc.invert(again)), retried_statuses=statuses)
    except InfrastructureError as error:
        raise InfrastructureError(f"part {part_name} in {store.root}: {error.message}") from error
    return rows
