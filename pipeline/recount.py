"""What a part's rows say about its counters: recounting, checking a footer, and the footer of a part under retry.

Rows hold all row totals and, at level `counts`, each sample's selections; per-layer repetition and co-selection exist
in footers alone. Invariant: a footer is accepted only if everything that rows can tell agrees with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.counters import RowTotals, RunCounters, SampleFacts
from pipeline.errors import InfrastructureError

Selections = NDArray[np.uint64]
_COUNT_COLUMNS = ("prompt_expert_counts", "completion_expert_counts")


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


def recount(table: pa.Table) -> Recount:
    """Count a part's rows from its own columns (see `rows.result_fields`), in any row order.

    All samples of an input row must be in the table. A sample without routing that isn't failed counts as
    `routing_invalid` unless the level was `off`.
    """
    groups = _rows_by_identity(table)
    facts = _sample_facts(table)
    totals = RowTotals()
    inputs = table["num_input_tokens"].fill_null(0).to_pylist()
    cached = table["num_cached_tokens"].fill_null(0).to_pylist()
    for members in groups:
        samples = [facts[member] for member in members]
        totals.add_row(max(inputs[m] for m in members), max(cached[m] for m in members), samples)
    return Recount(totals, _selections(table, groups, facts))


def check_part(counters: RunCounters, table: pa.Table) -> list[str]:
    """What a part's footer says differently from its rows, in words; empty when they agree."""
    return recountable(counters).differences(recount(table))


def kept_counters(footer: RunCounters, kept: pa.Table, *, retried_statuses: Collection[str]) -> RunCounters:
    """The counters of the rows that a retry leaves alone; merge the new rows' counters into it for the new footer.

    A retry takes out every input row of which any sample has one of `retried_statuses`, with all its samples; for
    statuses that carry no routing (`failed` alone) it may take out fewer. Row totals are recounted from `kept`; routing
    that rows don't hold comes from the old footer, where it lies apart by status. Call it before spending GPU time.

    Raises:
        InfrastructureError: the kept rows and the old footer contradict each other, so the footer can't be rebuilt.
    """
    gone = set(retried_statuses)
    routing = {key: totals.copy() for key, totals in footer.routing.items() if not gone & set(key.statuses.split("+"))}
    rows = recount(kept)
    result = RunCounters(footer.moe, rows.totals, routing)
    differences = recountable(result).differences(rows)
    if differences:
        raise InfrastructureError(
            f"{'; '.join(differences)} (footer without rows that are {' or '.join(sorted(gone))}, "
            "against the rows kept): the part's statistics can't be carried over; "
            "delete the part and rerun to do its shard again"
        )
    return result


def _rows_by_identity(table: pa.Table) -> list[list[int]]:
    """Positions of each input row's samples."""
    groups: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    identities = zip(table["input_file"].to_pylist(), table["input_row"].to_pylist(), strict=True)
    for position, identity in enumerate(identities):
        groups[identity].append(position)
    return list(groups.values())


def _sample_facts(table: pa.Table) -> list[SampleFacts]:
    statuses = table["status"].to_pylist()
    generated = table["num_generated_tokens"].fill_null(0).to_pylist()
    kinds = pc.struct_field(table["error"], "kind").to_pylist()
    missing = pc.is_null(table["routing"]).to_pylist()
    captured = not pa.types.is_null(table.schema.field("routing").type)
    return [
        SampleFacts(status, tokens, kind, routing_invalid=captured and absent and status != "failed")
        for status, tokens, kind, absent in zip(statuses, generated, kinds, missing, strict=True)
    ]


def _selections(table: pa.Table, groups: list[list[int]], facts: list[SampleFacts]) -> dict[str, Selections]:
    if pa.types.is_null(table.schema.field("routing").type):
        return {}
    present = pc.is_valid(table["routing"])
    counts = _counts(table["routing"].filter(present))
    labels = np.empty(table.num_rows, dtype=object)
    for members in groups:
        labels[members] = "+".join(sorted({facts[member].status for member in members}))
    labels = labels[present.to_numpy()]
    return {label: counts[labels == label].sum(axis=0, dtype=np.uint64) for label in sorted(set(labels))}


def _counts(routing: pa.ChunkedArray) -> NDArray[np.uint32]:
    """[samples, phase, L*E] of routing values, none of which is null."""
    array = routing.combine_chunks()
    columns = [pc.struct_field(array, name) for name in _COUNT_COLUMNS]
    flat = [column.flatten().to_numpy().reshape(len(column), column.type.list_size) for column in columns]
    return np.stack(flat, axis=1)
