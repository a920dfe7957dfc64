"""What a part's rows say about its counters: recounting, checking a footer, and the footer of a part under retry.

Rows hold all row totals and, at level `counts`, each sample's selections; per-layer repetition and co-selection exist
in footers alone. Invariant: a footer is accepted only if everything that rows can tell agrees with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.counters import RowTotals, RunCounters
from pipeline.errors import InfrastructureError
from pipeline.parts import OpenPart
from pipeline.rows import STATUSES

Selections = NDArray[np.uint64]
Flags = NDArray[np.bool_]
_COUNT_COLUMNS = ("prompt_expert_counts", "completion_expert_counts")
ROW_COLUMNS = (
    "input_file",
    "input_row",
    "status",
    "num_input_tokens",
    "num_cached_tokens",
    "num_generated_tokens",
    "error.kind",
)
"""What `recount` looks at besides routing, as `parts.OpenPart` names it."""
_FAILED = STATUSES.index("failed")
_PIECE_ROWS = 64  # 1 MiB of Mixtral 8x7B's counts while decoded; more is no faster


@dataclass(frozen=True, slots=True)
class Recount:
    """The part of `RunCounters` that output rows determine."""

    totals: RowTotals
    selections: dict[str, Selections] = field(default_factory=dict)
    """Statuses of an input row's samples, joined by `+` -> [phase, L*E]."""

    def differences(self, other: Recount) -> list[str]:
        """One sentence for each counter on which the two disagree, ours first."""
        names = RowTotals.__slots__
        pairs = [(name, getattr(self.totals, name), getattr(other.totals, name)) for name in names]
        found = [f"{name}: {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs]
        for statuses in sorted(self.selections.keys() | other.selections.keys()):
            mine, theirs = self.selections.get(statuses), other.selections.get(statuses)
            if mine is None or theirs is None or not np.array_equal(mine, theirs):
                found.append(f"expert selections of rows that are {statuses}: {_total(mine)} against {_total(theirs)}")
        return found


def _total(selections: Selections | None) -> str:
    return "none" if selections is None else f"{int(selections.sum())} in all"


def recountable(counters: RunCounters) -> Recount:
    """Project counters on what rows can tell; `recountable(footer) == recount(rows)` for every sound part."""
    selections: dict[str, Selections] = {}
    for key, totals in counters.routing.items():
        flat = totals.selections.reshape(2, -1)
        selections[key.statuses] = selections[key.statuses] + flat if key.statuses in selections else flat.copy()
    return Recount(counters.totals, selections)


def recount(table: pa.Table, *, keep: Flags | None = None, routing: Iterable[pa.Array] | None = None) -> Recount:
    """Count a part's rows from its own columns, in any row order.

    All samples of an input row must be in the table. A sample without routing that isn't failed counts as
    `routing_invalid` unless the level was `off`.

    Args:
        table: ROW_COLUMNS, and without `routing` also that column.
        keep: [samples], those to count; None for all. To filter the table first takes four times as long.
        routing: the column in pieces, of which one at a time is held: that of 4,096 rows of Mixtral 8x7B takes 35 MiB
            to decode at once.

    Raises:
        ValueError: a row has an unknown status.
    """
    keep = np.ones(table.num_rows, np.bool_) if keep is None else keep
    kept = table.select([name.partition(".")[0] for name in ROW_COLUMNS]).filter(pa.array(keep))
    statuses = _status_codes(kept)
    rows, num_rows = _input_rows(kept)
    totals = RowTotals(
        num_rows=num_rows,
        samples=_count_values(kept["status"]),
        error_kinds=_count_values(pc.struct_field(kept["error"], "kind")),
        num_input_tokens=_sum_of_maxima(kept["num_input_tokens"], rows, num_rows),
        num_cached_tokens=_sum_of_maxima(kept["num_cached_tokens"], rows, num_rows),
        num_generated_tokens=pc.sum(kept["num_generated_tokens"]).as_py() or 0,
    )
    groups = np.zeros(table.num_rows, np.int64)
    groups[keep] = _statuses_of_rows(statuses, rows, num_rows)
    may_lack_routing = ~keep
    may_lack_routing[keep] = statuses == _FAILED
    found, start = Recount(totals), 0
    for piece in table["routing"].chunks if routing is None else routing:
        end = start + len(piece)
        if not pa.types.is_null(piece.type):
            _add_routing(found, piece, groups[start:end], may_lack_routing[start:end])
        start = end
    return found


def check_part(counters: RunCounters, table: pa.Table) -> list[str]:
    """What a part's footer says differently from its rows, in words; empty when they agree."""
    return recountable(counters).differences(recount(table))


def kept_counters(
    footer: RunCounters,
    kept: pa.Table,
    *,
    retried_statuses: Collection[str],
    keep: Flags | None = None,
    routing: Iterable[pa.Array] | None = None,
) -> RunCounters:
    """The counters of the rows that a retry leaves alone; merge the new rows' counters into it for the new footer.

    Those are the rows of `kept`, or the ones of them that `keep` says; see `recount` for it and `routing`.

    A retry takes out every input row of which any sample has one of `retried_statuses`, with all its samples; for
    statuses that carry no routing (`failed` alone) it may take out fewer. Row totals are recounted from `kept`; routing
    that rows don't hold comes from the old footer, where it lies apart by status. Call it before spending GPU time.

    Raises:
        InfrastructureError: the kept rows and the old footer contradict each other, so the footer can't be rebuilt.
    """
    gone = set(retried_statuses)
    staying = {key: totals.copy() for key, totals in footer.routing.items() if not gone & set(key.statuses.split("+"))}
    rows = recount(kept, keep=keep, routing=routing)
    result = RunCounters(footer.moe, rows.totals, staying)
    differences = recountable(result).differences(rows)
    if differences:
        raise InfrastructureError(
            f"{'; '.join(differences)} (footer without rows that are {' or '.join(sorted(gone))}, "
            "against the rows kept): the part's statistics can't be carried over; "
            "delete the part and rerun to do its shard again"
        )
    return result


def routing_pieces(part: OpenPart, *, recorded: bool) -> Iterator[pa.Array]:
    """A part's `routing` for `recount`, counts only; `recorded`: whether the run keeps any."""
    names = [f"routing.{name}" for name in _COUNT_COLUMNS] if recorded else ["routing"]
    for batch in part.batches(names, num_rows=_PIECE_ROWS):
        yield batch["routing"]


def _status_codes(table: pa.Table) -> NDArray[np.int64]:
    """[samples]: position of the status in STATUSES."""
    codes = pc.index_in(table["status"].cast(pa.string()), value_set=pa.array(STATUSES))
    if codes.null_count:
        unknown = table["status"].filter(pc.is_null(codes))[0].as_py()
        raise ValueError(f"status {unknown!r} is unknown; it must be one of {', '.join(STATUSES)}")
    return np.asarray(codes.to_numpy(), np.int64)


def _input_rows(table: pa.Table) -> tuple[NDArray[np.intp], int]:
    """[samples]: which input row each is of, as a number from 0; and how many there are."""
    files = table["input_file"].cast(pa.string()).combine_chunks().dictionary_encode().indices.to_numpy()
    rows = table["input_row"].to_numpy()
    keys = files.astype(np.int64) * (int(rows.max(initial=0)) + 1) + rows
    distinct, of_sample = np.unique(keys, return_inverse=True)
    return of_sample, len(distinct)


def _count_values(column: pa.ChunkedArray) -> Counter[str]:
    """How often each value occurs, nulls left out."""
    counts = pc.value_counts(column.cast(pa.string()).combine_chunks().drop_null())
    return Counter({count["values"]: count["counts"] for count in counts.to_pylist()})


def _sum_of_maxima(column: pa.ChunkedArray, rows: NDArray[np.intp], num_rows: int) -> int:
    """Each input row's largest value, nulls being 0, summed over input rows: samples repeat what is their row's."""
    largest = np.full(num_rows, np.iinfo(np.int64).min)
    np.maximum.at(largest, rows, column.fill_null(0).to_numpy().astype(np.int64))
    return int(largest.sum())


def _statuses_of_rows(statuses: NDArray[np.int64], rows: NDArray[np.intp], num_rows: int) -> NDArray[np.int64]:
    """[samples]: statuses of all samples of the sample's input row, as bits in the order of STATUSES; never 0."""
    bits = np.zeros(num_rows, np.int64)
    np.bitwise_or.at(bits, rows, 1 << statuses)
    return bits[rows]


def _add_routing(found: Recount, routing: pa.Array, groups: NDArray[np.int64], may_lack_routing: Flags) -> None:
    """Add some samples' routing, [samples].

    Args:
        found: what to add to.
        routing: their values of the column.
        groups: `_statuses_of_rows`, 0 for samples that aren't counted.
        may_lack_routing: samples that are failed, or aren't counted.
    """
    has_routing = pc.is_valid(routing).to_numpy(zero_copy_only=False)
    found.totals.num_routing_invalid += int((~has_routing & ~may_lack_routing).sum())
    labels = groups[has_routing]
    # `flatten` leaves out nulls; to filter the structs themselves takes 30 times as long.
    columns = [pc.struct_field(routing, name) for name in _COUNT_COLUMNS]
    counts = [column.flatten().to_numpy().reshape(len(labels), column.type.list_size) for column in columns]
    for bits in sorted(set(labels.tolist()) - {0}):
        total = np.stack([count[labels == bits].sum(axis=0, dtype=np.uint64) for count in counts])
        name = _label(bits)
        found.selections[name] = found.selections[name] + total if name in found.selections else total


def _label(bits: int) -> str:
    return "+".join(sorted(name for code, name in enumerate(STATUSES) if bits >> code & 1))
