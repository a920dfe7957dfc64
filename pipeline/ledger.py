"""What a run has committed and what is left, read from its output and nowhere else.

    _run/fingerprint.json   the birth of the run: what its results depend on
    _run/plan.json          its shards, used again by every later run on this output
    _run/events/E-N.json    what happened, N-th event of ownership E
    data/                   the committed parts: a shard is done when its part is there

Knows nothing of rows or engines. Invariant: what it says is what a listing of `data/` says; there is no second record.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeVar

from pipeline.counters import RunCounters
from pipeline.errors import InfrastructureError, SpecError
from pipeline.lease import Lease
from pipeline.parts import DATA, PartFooter, committed_parts, part_sizes, read_footer
from pipeline.resume import Decision, Found, Resume, decide, fingerprint_digest, refuse_foreign_parts
from pipeline.shards import Plan, Shard
from pipeline.storage import Store

RUN = "_run"
FINGERPRINT = f"{RUN}/fingerprint.json"
PLAN = f"{RUN}/plan.json"
EVENTS = f"{RUN}/events"

_T = TypeVar("_T")

_FOOTER_THREADS = 16
# Footers held at once: 256 of at most some 100 kB, whatever the number of parts.
_FOOTER_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Opened:
    """How a run begins."""

    plan: Plan
    """The one to work by: on resume, the stored one."""
    decision: Decision
    num_committed: int
    """Shards done before."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the footers say, in one pass."""

    totals: RunCounters
    """Of all committed parts together."""
    chosen: dict[int, Shard]
    """Shard index -> shard of each part that has rows of the statuses and error kinds asked for, in plan order."""


class Ledger:
    """The record of one output. Give the lease to write; reading needs none.

    Guarantees:
    - fingerprint and plan are never replaced once a part is committed, so part names keep their meaning.
    - an output is never continued under another fingerprint, nor with files in `data/` that the plan doesn't know.
    - totals count every committed part once, and nothing else.
    """

    def __init__(self, store: Store, *, lease: Lease | None = None) -> None:
        self.store = store
        self._lease = lease
        self._event_numbers = itertools.count(1)

    def look(self, plan: Plan, fingerprint_fields: Mapping[str, str], *, resume: Resume) -> Opened:
        """What `open_run` would find and decide, from reads alone; needs no lease, so it may be out of date at once.

        Raises:
            SpecError: this run can't go on in this output; says why, naming each field that changed.
        """
        found = Found(self.fingerprint(), committed_parts(self.store))
        decision = decide(found, fingerprint_fields, resume=resume, output=self.store.root)
        if decision is not Decision.REPLACE:
            plan = self._stored_plan() or plan
        refuse_foreign_parts(found.part_names, _part_names(plan), output=self.store.root)
        return Opened(plan, decision, len(found.part_names))

    def open_run(self, plan: Plan, fingerprint_fields: Mapping[str, str], *, resume: Resume) -> Opened:
        """Start the run or continue the one that is there. Safe to repeat after a crash at any point.

        Raises:
            SpecError: this run can't go on in this output; says why, naming each field that changed.
            InfrastructureError: another process took the output over.
        """
        opened = self.look(plan, fingerprint_fields, resume=resume)
        # Only now may anything be changed. Temporaries are left by writers that died; object stores have none.
        self._sweep()
        if opened.decision is Decision.REPLACE:
            # In this order: between the two, what is left is the earlier run without its plan, and still replaceable.
            # A part that a stalled earlier owner might yet commit names its fingerprint, and `footers` refuses it.
            self._delete(PLAN)
            self._delete(FINGERPRINT)
        if opened.decision is not Decision.RESUME:
            self._create(FINGERPRINT, _to_json({"fields": dict(fingerprint_fields)}))
        if self._stored_plan() is None:
            self._create(PLAN, opened.plan.to_json().encode())
        return opened

    def fingerprint(self) -> dict[str, str] | None:
        """Fields that the run's results depend on; None if no run ever began here."""
        data = self._read(FINGERPRINT)
        return None if data is None else _parse(self.store, FINGERPRINT, data, _fingerprint_fields)

    @cached_property
    def plan(self) -> Plan:
        """The stored plan.

        Raises:
            SpecError: no run began here.
        """
        plan = self._stored_plan()
        if plan is None:
            raise SpecError(f"{self.store.root} holds no run; check the path")
        return plan

    def todo(self) -> list[int]:
        """Indices of the shards that aren't committed, in plan order."""
        committed = committed_parts(self.store)
        return [index for name, index in self._indices.items() if name not in committed]

    def survey(self, *, statuses: Collection[str] = (), kinds: Collection[str] | None = None) -> Survey:
        """Add up all committed parts, and find those with rows of these statuses and, if given, these error kinds."""
        totals, chosen = RunCounters(), dict[int, Shard]()
        for footer in self.footers():
            counters = RunCounters.from_json_bytes(footer.counters)
            totals.update(counters)
            if _matches(counters, statuses, kinds):
                index = self._indices[footer.part_name]
                chosen[index] = self.plan.shard(index)
        return Survey(totals, chosen)

    def failed_parts(
        self, *, statuses: Collection[str] = ("failed",), kinds: Collection[str] | None = None
    ) -> dict[int, Shard]:
        """Return {shard index: shard} of the parts with rows of these statuses and, if given, these error kinds."""
        return self.survey(statuses=statuses, kinds=kinds).chosen

    def totals(self) -> RunCounters:
        """Counters of all committed parts together, from their footers alone."""
        return self.survey().totals

    def footers(self) -> Iterator[PartFooter]:
        """Footers of all committed parts of the plan, in plan order, a few at a time.

        Raises:
            InfrastructureError: a part is damaged, or says in `extra["fingerprint"]` that it is of another run.
        """
        digest = fingerprint_digest(self.fingerprint() or {})
        sizes = part_sizes(self.store)
        wanted = (name for name in self._indices if name in sizes)
        with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footers") as pool:
            while chunk := list(itertools.islice(wanted, _FOOTER_CHUNK)):
                for footer in pool.map(lambda name: read_footer(self.store, name, size=sizes[name]), chunk):
                    if footer.extra.get("fingerprint", digest) != digest:
                        raise InfrastructureError(
                            f"part {footer.part_name} in {self.store.root}/{DATA} was made by a different job; "
                            "delete that one file and rerun the same command: its shard is done again"
                        )
                    yield footer

    def record_event(self, kind: str, **facts: Any) -> None:
        """Write down that something happened to the run; for people and `status`, never read to decide anything."""
        epoch = self._lease.epoch if self._lease else 0
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "epoch": epoch, "kind": kind, **facts}
        self.store.put(f"{EVENTS}/{epoch:06d}-{next(self._event_numbers):06d}.json", _to_json(event))

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return [json.loads(self.store.read(f"{EVENTS}/{name}")) for name in sorted(self.store.list(EVENTS))]

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(_part_names(self.plan))}

    def _stored_plan(self) -> Plan | None:
        data = self._read(PLAN)
        return None if data is None else _parse(self.store, PLAN, data, Plan.from_json)

    def _sweep(self) -> None:
        for folder in ("", DATA, RUN, EVENTS, "routing", "review"):
            self.store.sweep(folder)

    def _read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def _delete(self, name: str) -> None:
        if self._lease is not None:
            self._lease.check()
        self.store.delete(name)

    def _create(self, name: str, data: bytes) -> None:
        """Create an object of the run; only an owner that was silent and lost the output can find it there."""
        if self._lease is not None:
            self._lease.check()
        try:
            self.store.create(name, data)
        except FileExistsError as error:
            raise InfrastructureError(
                f"{self.store.root}/{name} was created by another run at this moment; rerun the same command"
            ) from error


def _part_names(plan: Plan) -> Sequence[str]:
    return [plan.shard(index).part_name for index in range(plan.num_shards)]


def _fingerprint_fields(text: str) -> dict[str, str]:
    return dict(json.loads(text)["fields"])


def _matches(counters: RunCounters, statuses: Iterable[str], kinds: Iterable[str] | None) -> bool:
    totals = counters.totals
    has_status = any(totals.samples.get(status, 0) for status in statuses)
    return has_status and (kinds is None or any(totals.error_kinds.get(kind, 0) for kind in kinds))


def _parse(store: Store, name: str, data: bytes, parse: Callable[[str], _T]) -> _T:
    try:
        return parse(data.decode())
    except (ValueError, KeyError, TypeError) as error:
        raise InfrastructureError(
            f"{store.root}/{name} can't be understood ({error}); restore that file, or start in an empty output.path"
        ) from error


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()
