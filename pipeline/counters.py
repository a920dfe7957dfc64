"""Everything a part knows about its rows, in counters that merge: rows, statuses, tokens and routing.

Lives in a part's footer, so data and statistics commit together; run totals are merges of footers, never of rows. Does
no I/O. Invariant: the result depends on the set of rows alone, not on how they were cut into parts or ordered.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from pipeline.engine import MoeShape
from pipeline.errors import InfrastructureError
from pipeline.routing import RowRouting
from pipeline.routing_totals import RoutingTotals, pack, unpack
from pipeline.rows import STATUSES

FORMAT_VERSION = 1

ALL = "(all)"
NULL = "(null)"
OTHER = "(other)"
RESERVED_SLICES = frozenset({ALL, NULL, OTHER})
MAX_SLICES = 1_000
MAX_SLICE_CHARS = 128


def slice_name(value: object) -> str:
    """Name of the slice that a user's value belongs to.

    Null has its own slice; a value spelt like a reserved slice is quoted; one longer than 128 characters is cut and
    told apart from others with the same beginning by a hash of the whole.
    """
    if value is None:
        return NULL
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    if text in RESERVED_SLICES:
        return repr(text)
    if len(text) <= MAX_SLICE_CHARS:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{text[: MAX_SLICE_CHARS - 17]}~{digest}"


class RoutingKey(NamedTuple):
    """What routing counters are kept apart by."""

    slice_name: str
    statuses: str
    """Statuses of the input row's samples, sorted, joined by `+`: a retry takes whole rows out by status."""


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What counters want to know of one output row."""

    status: str
    num_generated_tokens: int = 0
    error_kind: str | None = None
    routing: RowRouting | None = None
    routing_invalid: bool = False
    """The engine reported routing, and the guard refused it."""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is unknown; it must be one of {', '.join(STATUSES)}")
        _check_count("num_generated_tokens", self.num_generated_tokens)


@dataclass(slots=True)
class RowTotals:
    """Counters that a part's rows alone can give again. All are plain integers, without an upper limit."""

    num_rows: int = 0
    """Input rows."""
    samples: Counter[str] = field(default_factory=Counter)
    """Output rows by status."""
    error_kinds: Counter[str] = field(default_factory=Counter)
    """Output rows by `error.kind`."""
    num_input_tokens: int = 0
    """Once per input row, whatever the number of samples; rows that failed after templating included."""
    num_cached_tokens: int = 0
    """Of the input tokens, those that the engine had in its prefix cache."""
    num_generated_tokens: int = 0
    """Over all samples."""
    num_routing_invalid: int = 0
    """Samples whose routing the guard refused."""

    def add_row(self, num_input_tokens: int, num_cached_tokens: int, samples: Sequence[SampleFacts]) -> None:
        """Add one input row and its output rows."""
        if not samples:
            raise ValueError("an input row without an output row: every row must come out, at least as failed")
        self.num_rows += 1
        self.num_input_tokens += _check_count("num_input_tokens", num_input_tokens)
        self.num_cached_tokens += _check_count("num_cached_tokens", num_cached_tokens)
        for sample in samples:
            self.samples[sample.status] += 1
            self.num_generated_tokens += sample.num_generated_tokens
            self.num_routing_invalid += sample.routing_invalid
            if sample.error_kind is not None:
                self.error_kinds[sample.error_kind] += 1

    def add(self, other: RowTotals) -> None:
        """Add other totals, in place."""
        self.num_rows += other.num_rows
        self.samples.update(other.samples)
        self.error_kinds.update(other.error_kinds)
        self.num_input_tokens += other.num_input_tokens
        self.num_cached_tokens += other.num_cached_tokens
        self.num_generated_tokens += other.num_generated_tokens
        self.num_routing_invalid += other.num_routing_invalid

    @property
    def num_samples(self) -> int:
        """Output rows."""
        return self.samples.total()


@dataclass(slots=True)
class RunCounters:
    """Counters of any set of input rows: a row, a part, a run.

    Guarantees:
    - merging is associative and commutative, and `RunCounters()` is its identity.
    - equal counters have equal bytes, and `from_json_bytes` gives back exactly what `to_json_bytes` was given.
    - at most 1,000 slices are kept besides the reserved ones, with exact counts; the others are in `(other)`.

    Which 1,000: those whose names have the smallest hashes. A slice among them for the whole run is among them in every
    part that has it, so no part ever folds away what another keeps, and order can't matter; "the most frequent" has no
    such rule in bounded memory.
    """

    moe: MoeShape | None = None
    """None as long as no sample with routing was added."""
    totals: RowTotals = field(default_factory=RowTotals)
    routing: dict[RoutingKey, RoutingTotals] = field(default_factory=dict)

    def add_row(
        self,
        samples: Sequence[SampleFacts],
        *,
        num_input_tokens: int | None,
        num_cached_tokens: int | None,
        moe: MoeShape | None = None,
        slice_name: str = ALL,
    ) -> None:
        """Add one input row with all of its samples; `moe` is needed when any has routing.

        Raises:
            ValueError: a negative count, an unknown status, no sample, or routing of another model.
        """
        self.totals.add_row(num_input_tokens or 0, num_cached_tokens or 0, samples)
        key = RoutingKey(slice_name, "+".join(sorted({sample.status for sample in samples})))
        known = len(self.routing)
        for sample in samples:
            if sample.routing is not None:
                self._routing_of(key, self._adopt(moe)).add_row(sample.routing)
        if len(self.routing) > known:
            self._fold_slices()

    def update(self, other: RunCounters) -> None:
        """Add other counters, in place.

        Raises:
            ValueError: they are of another model.
        """
        if other.moe is not None:
            self._adopt(other.moe)
        self.totals.add(other.totals)
        known = len(self.routing)
        for key, totals in other.routing.items():
            self._routing_of(key, totals.moe).add(totals)
        if len(self.routing) > known:
            self._fold_slices()

    def merge(self, other: RunCounters) -> RunCounters:
        """The counters of both sets of rows; neither operand changes."""
        return merge_all([self, other])

    def slices(self) -> dict[str, RoutingTotals]:
        """Routing per slice, over all statuses, in name order; only slices that have routing."""
        merged: dict[str, RoutingTotals] = {}
        for key in sorted(self.routing):
            totals = self.routing[key]
            merged.setdefault(key.slice_name, RoutingTotals(totals.moe)).add(totals)
        return merged

    def to_json_bytes(self) -> bytes:
        """Compact ASCII JSON for a Parquet footer."""
        keys = sorted(self.routing)
        record = {
            "version": FORMAT_VERSION,
            "moe": None if self.moe is None else [self.moe.num_layers, self.moe.num_experts, self.moe.top_k],
            "rows": self.totals.num_rows,
            "samples": dict(self.totals.samples),
            "error_kinds": dict(self.totals.error_kinds),
            "input_tokens": self.totals.num_input_tokens,
            "cached_tokens": self.totals.num_cached_tokens,
            "generated_tokens": self.totals.num_generated_tokens,
            "routing_invalid": self.totals.num_routing_invalid,
            "routing_keys": keys,
            "routing": pack([self.routing[key] for key in keys]),
        }
        return json.dumps(record, separators=(",", ":"), sort_keys=True).encode("ascii")

    @classmethod
    def from_json_bytes(cls, data: bytes) -> RunCounters:
        """Inverse of `to_json_bytes`.

        Raises:
            InfrastructureError: the bytes are damaged or of another version.
        """
        try:
            return _from_record(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InfrastructureError(
                f"counters in a part's footer can't be read ({type(error).__name__}: {error}); "
                "delete that part and rerun: its shard is then done again"
            ) from error

    def _adopt(self, moe: MoeShape | None) -> MoeShape:
        if moe is None:
            raise ValueError("a sample has routing, but no MoE shape was given with it")
        if self.moe is not None and self.moe != moe:
            raise ValueError(f"counters of {moe} can't be merged into counters of {self.moe}; one run has one model")
        self.moe = moe
        return moe

    def _routing_of(self, key: RoutingKey, moe: MoeShape) -> RoutingTotals:
        if key not in self.routing:
            self.routing[key] = RoutingTotals(moe)
        return self.routing[key]

    def _fold_slices(self) -> None:
        """Move all but the MAX_SLICES slices of smallest rank into OTHER."""
        if len(self.routing) <= MAX_SLICES:
            return
        names = {key.slice_name for key in self.routing} - RESERVED_SLICES
        for name in sorted(names, key=_slice_rank)[MAX_SLICES:]:
            for key in [key for key in self.routing if key.slice_name == name]:
                folded = self.routing.pop(key)
                self._routing_of(RoutingKey(OTHER, key.statuses), folded.moe).add(folded)


def merge_all(parts: Iterable[RunCounters]) -> RunCounters:
    """The counters of all parts together, one pass, without changing them.

    Raises:
        ValueError: two parts are of different models.
    """
    merged = RunCounters()
    for part in parts:
        merged.update(part)
    return merged


@lru_cache(maxsize=4 * MAX_SLICES)
def _slice_rank(name: str) -> tuple[bytes, str]:
    return hashlib.blake2b(name.encode(), digest_size=8).digest(), name


def _check_count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be an integer and not negative")
    return value


def _count_by(name: str, record: dict[str, Any]) -> Counter[str]:
    return Counter({str(key): _check_count(f"{name}.{key}", value) for key, value in record[name].items()})


def _from_record(record: dict[str, Any]) -> RunCounters:
    if record["version"] != FORMAT_VERSION:
        raise ValueError(f"version {record['version']} was written, version {FORMAT_VERSION} is understood")
    totals = RowTotals(
        num_rows=_check_count("rows", record["rows"]),
        samples=_count_by("samples", record),
        error_kinds=_count_by("error_kinds", record),
        num_input_tokens=_check_count("input_tokens", record["input_tokens"]),
        num_cached_tokens=_check_count("cached_tokens", record["cached_tokens"]),
        num_generated_tokens=_check_count("generated_tokens", record["generated_tokens"]),
        num_routing_invalid=_check_count("routing_invalid", record["routing_invalid"]),
    )
    if record["moe"] is None:
        return RunCounters(totals=totals)
    moe = MoeShape(*(_check_count("moe", size) for size in record["moe"]))
    keys = [RoutingKey(str(name), str(statuses)) for name, statuses in record["routing_keys"]]
    if len(set(keys)) < len(keys):
        raise ValueError("a slice and status occur twice")
    return RunCounters(moe, totals, dict(zip(keys, unpack(record["routing"], len(keys), moe), strict=True)))
