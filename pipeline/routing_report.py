"""Merged counters -> the tables of `routing/`: expert shares, balance and repetition per layer, co-selection, drift.

Pure. `experts` and `coselection` hold counts and add up over their rows, so they have no total rows; `layers` holds
ratios, which don't, so it has them: slice `(all)` and phase `all`. A ratio without a denominator is null, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.counters import ALL, RunCounters
from pipeline.errors import SpecError
from pipeline.routing import PHASES
from pipeline.routing_layout import expert_pairs, num_expert_pairs
from pipeline.routing_measures import (
    Floats,
    chance_distance,
    coselection_lift,
    jain_index,
    jensen_shannon_distance,
    max_over_mean,
    normalised_entropy,
    random_repetition,
    ratio,
    shares_of,
)
from pipeline.routing_totals import RoutingTotals

# 1,000 slices of Mixtral 8x7B are 896,000 rows; a model of 64 experts would write 52 million: slices are summed there.
MAX_COSELECTION_ROWS = 4_000_000

_NAMES = pa.dictionary(pa.int32(), pa.string())
EXPERTS_SCHEMA = pa.schema(
    [
        ("slice", _NAMES),
        ("phase", _NAMES),
        ("layer", pa.int16()),
        ("expert", pa.int16()),
        ("selections", pa.uint64()),
        ("share", pa.float64()),
    ]
)
LAYERS_SCHEMA = pa.schema(
    [
        ("slice", _NAMES),
        ("phase", _NAMES),
        ("layer", pa.int16()),
        ("tokens", pa.uint64()),
        ("entropy", pa.float64()),
        ("max_over_mean", pa.float64()),
        ("jain", pa.float64()),
        ("dead_experts", pa.int16()),
        ("repeat_first", pa.float64()),
        ("repeat_first_random", pa.float64()),
        ("repeat_any", pa.float64()),
        ("repeat_any_random", pa.float64()),
    ]
)
COSELECTION_SCHEMA = pa.schema(
    [
        ("slice", _NAMES),
        ("layer", pa.int16()),
        ("expert_a", pa.int16()),
        ("expert_b", pa.int16()),
        ("count", pa.uint64()),
        ("lift", pa.float64()),
    ]
)
DRIFT_SCHEMA = pa.schema([("layer", pa.int16()), ("distance", pa.float64()), ("expected_by_chance", pa.float64())])
SLICE_DRIFT_SCHEMA = pa.schema([("slice", _NAMES), ("phase", _NAMES), *DRIFT_SCHEMA])
DRIFT_PHASES = ("all", *PHASES)


def experts_table(counters: RunCounters) -> pa.Table:
    """(slice, phase, layer, expert, selections, share): one row each; shares of a layer add up to 1.

    `sum(selections)` is the sum over all rows' count columns. Share is null where the phase has no token.
    """
    return _concat(EXPERTS_SCHEMA, (_experts(name, totals) for name, totals in counters.slices().items()))


def _experts(name: str, totals: RoutingTotals) -> pa.Table:
    _, num_layers, num_experts = totals.selections.shape
    columns = {
        "slice": _repeat([name], totals.selections.size),
        "phase": _repeat(PHASES, num_layers * num_experts),
        "layer": np.tile(np.repeat(np.arange(num_layers), num_experts), 2),
        "expert": np.tile(np.arange(num_experts), 2 * num_layers),
        "selections": totals.selections.ravel(),
        "share": _nullable(shares_of(totals.selections)),
    }
    return _table(columns, EXPERTS_SCHEMA)


def layers_table(counters: RunCounters) -> pa.Table:
    """One row per slice (and `(all)`), phase (and `all`) and layer.

    entropy: see `normalised_entropy`. max_over_mean, jain: load balance. dead_experts: chosen by no token. repeat_*:
    share of consecutive tokens with the same first choice / a common expert, over all pairs of the slice (long samples
    weigh more; the row columns weigh samples alike), beside the value expected at random.
    """
    slices = counters.slices()
    if slices:
        slices[ALL] = _sum(slices.values())
    return _concat(LAYERS_SCHEMA, (part for name, totals in slices.items() for part in _layers(name, totals)))


def _layers(name: str, totals: RoutingTotals) -> Iterator[pa.Table]:
    """The rows of one slice, a phase at a time."""
    picks: dict[str, Callable[[NDArray[np.uint64]], NDArray[np.uint64]]] = {
        "all": lambda counter: counter.sum(axis=0, dtype=np.uint64),
        PHASES[0]: lambda counter: counter[0],
        PHASES[1]: lambda counter: counter[1],
    }
    random = random_repetition(totals.moe)
    for phase, pick in picks.items():
        load, pairs, tokens = pick(totals.selections), pick(totals.num_pairs), int(pick(totals.num_tokens))
        num_layers = len(load)
        columns = {
            "slice": _repeat([name], num_layers),
            "phase": _repeat([phase], num_layers),
            "layer": np.arange(num_layers),
            "tokens": np.full(num_layers, tokens, dtype=np.uint64),
            "entropy": _nullable(normalised_entropy(load)),
            "max_over_mean": _nullable(max_over_mean(load)),
            "jain": _nullable(jain_index(load)),
            "dead_experts": pa.array((load == 0).sum(axis=1), mask=np.full(num_layers, not tokens)),
            "repeat_first": _nullable(ratio(pick(totals.same_first), pairs)),
            "repeat_first_random": np.full(num_layers, random.first),
            "repeat_any": _nullable(ratio(pick(totals.same_any), pairs)),
            "repeat_any_random": np.full(num_layers, random.any),
        }
        yield _table(columns, LAYERS_SCHEMA)


def coselection_table(counters: RunCounters) -> pa.Table:
    """(slice, layer, expert_a < expert_b, count, lift): tokens that chose both, and `coselection_lift`.

    Empty when the model picks one expert per token or has too many pairs (`routing_layout.MAX_COSELECTION_CELLS`). When
    slices times pairs would pass 4 million rows, slices are summed to `(all)`.
    """
    slices = counters.slices()
    if not slices or counters.moe is None or not num_expert_pairs(counters.moe):
        return COSELECTION_SCHEMA.empty_table()
    if len(slices) * counters.moe.num_layers * num_expert_pairs(counters.moe) > MAX_COSELECTION_ROWS:
        slices = {ALL: _sum(slices.values())}
    return _concat(COSELECTION_SCHEMA, (_coselection(name, totals) for name, totals in slices.items()))


def _coselection(name: str, totals: RoutingTotals) -> pa.Table:
    matrix = totals.coselection
    if matrix is None:
        return COSELECTION_SCHEMA.empty_table()
    first, second = expert_pairs(totals.moe.num_experts)
    num_layers, num_pairs = len(matrix), len(first)
    columns = {
        "slice": _repeat([name], num_layers * num_pairs),
        "layer": np.repeat(np.arange(num_layers), num_pairs),
        "expert_a": np.tile(first, num_layers),
        "expert_b": np.tile(second, num_layers),
        "count": matrix[:, first, second].ravel(),
        "lift": _nullable(coselection_lift(matrix)[:, first, second]),
    }
    return _table(columns, COSELECTION_SCHEMA)


def drift(a: pa.Table, b: pa.Table) -> pa.Table:
    """(layer, distance, expected_by_chance) between two `experts` tables, over all of their slices and phases.

    distance: Jensen-Shannon distance of the two distributions over experts, the square root of the base-2 divergence
    (Lin 1991; a metric: Endres and Schindelin 2003): 0 is equal, 1 is disjoint; null where either has no selections.
    expected_by_chance: sqrt((E - 1) (1/n_a + 1/n_b) / (8 ln 2)), the root mean square distance of two samples of one
    distribution if selections were independent. Those of neighbouring tokens aren't, so read a distance of about this
    size as no drift. Filter the tables first to compare slices or phases.

    Raises:
        SpecError: the tables are of models with different layers or experts.
    """
    load_a, load_b = _comparable_loads(a, b)
    return _table({"layer": np.arange(len(load_a)), **_distances(load_a, load_b)}, DRIFT_SCHEMA)


def drift_by_slice(a: pa.Table, b: pa.Table) -> pa.Table:
    """(slice, phase, layer, distance, expected_by_chance): `drift` of each slice that both tables have, and phase.

    First comes slice `(all)`, which is everything, slices that only one table has included; then the others by name.
    Phase `all` is both phases together.

    Raises:
        SpecError: as `drift`.
    """
    num_layers, num_experts = _comparable_loads(a, b)[0].shape
    names = [ALL, *sorted((slice_names(a) & slice_names(b)) - {ALL})]
    shape = (len(names), len(DRIFT_PHASES), num_layers, num_experts)
    loads = zip(_loads_by_slice(a, names, shape), _loads_by_slice(b, names, shape), strict=True)
    parts = []
    for name, (load_a, load_b) in zip(names, loads, strict=True):
        columns = {
            "slice": _repeat([name], len(DRIFT_PHASES) * num_layers),
            "phase": _repeat(DRIFT_PHASES, num_layers),
            "layer": np.tile(np.arange(num_layers), len(DRIFT_PHASES)),
            **_distances(load_a, load_b),
        }
        parts.append(_table(columns, SLICE_DRIFT_SCHEMA))
    return _concat(SLICE_DRIFT_SCHEMA, parts)


def _distances(load_a: NDArray[np.uint64], load_b: NDArray[np.uint64]) -> dict[str, pa.Array]:
    return {
        "distance": _nullable(jensen_shannon_distance(shares_of(load_a), shares_of(load_b))),
        "expected_by_chance": _nullable(chance_distance(load_a, load_b)),
    }


def _comparable_loads(a: pa.Table, b: pa.Table) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    load_a, load_b = _load(a), _load(b)
    if load_a.shape != load_b.shape:
        raise SpecError(
            f"drift compares runs of models with the same layers and experts, but one has {_dims(load_a)} and the "
            f"other {_dims(load_b)}; give two runs of one model, or of fine-tunes of one model"
        )
    return load_a, load_b


def slice_names(experts: pa.Table) -> set[str]:
    """Slices of an `experts` table; `(all)` when the run wasn't sliced."""
    return set(pc.unique(experts["slice"].cast(pa.string())).to_pylist())


def _loads_by_slice(experts: pa.Table, names: Sequence[str], shape: tuple[int, int, int, int]) -> NDArray[np.uint64]:
    """[slices in the order of `names`, DRIFT_PHASES, L, E] selections; the first slice is everything."""
    loads = np.zeros(shape, np.uint64)
    slices = pc.index_in(experts["slice"].cast(pa.string()), value_set=pa.array(names)).fill_null(0).to_numpy()
    phases = pc.index_in(experts["phase"].cast(pa.string()), value_set=pa.array(DRIFT_PHASES)).to_numpy()
    cells = (phases, experts["layer"].to_numpy(), experts["expert"].to_numpy())
    selections = experts["selections"].to_numpy()
    np.add.at(loads, (slices, *cells), selections)
    loads[0] = 0  # so far what is in no slice of `names`
    np.add.at(loads[0], cells, selections)
    loads[:, 0] = loads[:, 1:].sum(axis=1)
    return loads


def _load(experts: pa.Table) -> NDArray[np.uint64]:
    """[L, E] selections of an `experts` table, summed over slices and phases."""
    if not experts.num_rows:
        return np.zeros((0, 0), dtype=np.uint64)
    layer, expert = experts["layer"].to_numpy(), experts["expert"].to_numpy()
    load = np.zeros((int(layer.max()) + 1, int(expert.max()) + 1), dtype=np.uint64)
    np.add.at(load, (layer, expert), experts["selections"].to_numpy())
    return load


def _dims(load: NDArray[Any]) -> str:
    return f"{load.shape[0]} layers x {load.shape[1]} experts"


def _sum(parts: Iterable[RoutingTotals]) -> RoutingTotals:
    first, *others = parts
    total = first.copy()
    for other in others:
        total.add(other)
    return total


def _nullable(values: Floats) -> pa.Array:
    return pa.array(values.ravel(), mask=np.isnan(values.ravel()))


def _repeat(names: Iterable[str], times: int) -> pa.DictionaryArray:
    names = list(names)
    return pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(names), dtype=np.int32), times), pa.array(names))


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table({name: pa.array(values) for name, values in columns.items()}).cast(schema)


def _concat(schema: pa.Schema, parts: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *parts]).unify_dictionaries()
