"""The runs of an incremental job, as a chain of claims: which rows each one has, from the moment it claimed them.

    OUTPUT/_chain/000007.json            the claim of run 7: created once, never changed; names its predecessor's hash
    OUTPUT/_chain/000007.released.json   what run 7 didn't do of it and never will
    OUTPUT/_chain/objects/...            the claims' plans and keys of rows, named in them with their hashes
    OUTPUT/runs/000007-2026-11-20/       run 7: a directory like that of any other job

Knows nothing of what makes a row new. Invariant: claim N exists only if claim N-1 does, and was created by somebody who
had read claim N-1; so no two claims were made without one knowing of the other.
"""

from __future__ import annotations

import hashlib
import io
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs.claims import Claim, Release, StoredObject
from pipeline.errors import InfrastructureError, SpecError
from pipeline.ledger import FINGERPRINT
from pipeline.row_keys import Keys
from pipeline.shards import Plan
from pipeline.storage import Store

CHAIN = "_chain"
OBJECTS = f"{CHAIN}/objects"
RUNS = "runs"
_CLAIM = re.compile(r"^(\d{6,})\.json$")
_ROWS_AT_ONCE = 1 << 20
"""Of a claim's keys: 36 MB in memory."""


@dataclass(frozen=True, slots=True)
class Link:
    """A claim and what became of it."""

    claim: Claim
    sha256: str
    released: Release | None

    @property
    def kept_nothing(self) -> bool:
        """Whether the run was given up before its first commit."""
        return self.released is not None and not self.released.kept_parts

    def __str__(self) -> str:
        return f"run {self.claim.run} ({self.claim.folder})"


@dataclass(frozen=True, slots=True)
class Chain:
    """All claims of a job, oldest first."""

    store: Store
    links: tuple[Link, ...] = ()

    @property
    def last(self) -> Link | None:
        """The latest claim."""
        return self.links[-1] if self.links else None

    @property
    def effective(self) -> tuple[Link, ...]:
        """Claims of which something was or will be done."""
        return tuple(link for link in self.links if not link.kept_nothing)

    @property
    def head(self) -> tuple[int, bool]:
        """Changes whenever the chain does."""
        return len(self.links), bool(self.last and self.last.released)

    def run_store(self, link: Link) -> Store:
        """The run's own output."""
        return Store(f"{self.store.root.rstrip('/')}/{link.claim.folder}")

    def plan_of(self, claim: Claim) -> Plan:
        """The run's plan."""
        return Plan.from_json(_read_object(self.store, claim.plan).decode())

    def keys_of(self, link: Link) -> Iterator[Keys]:
        """Keys of the rows that the run has or will have, some at a time; rows that it released are left out."""
        if link.claim.keys is None or link.kept_nothing:
            return
        kept = None if link.released is None else _Kept(self.plan_of(link.claim), link.released)
        with pq.ParquetFile(io.BytesIO(_read_object(self.store, link.claim.keys))) as file:
            for group in range(file.num_row_groups):
                keys = Keys.from_table(file.read_row_group(group))
                yield keys if kept is None else keys.take(kept.holds(keys))

    def create(self, claim: Claim) -> None:
        """Append a claim.

        Raises:
            InfrastructureError: somebody else has appended one since this chain was read.
        """
        _create(self.store, f"{CHAIN}/{claim.run:06d}.json", claim.to_bytes())

    def release(self, release: Release) -> None:
        """Give back what the last claim's run has not committed.

        Raises:
            InfrastructureError: somebody else did, at this moment.
        """
        _create(self.store, f"{CHAIN}/{release.run:06d}.released.json", release.to_bytes())


class _Kept:
    """Which rows of a plan lie in the parts that were kept."""

    def __init__(self, plan: Plan, release: Release) -> None:
        kept = set(release.kept_parts)
        width = plan.rows_per_shard
        self._width, self._stride = width, max((file.num_rows for file in plan.files), default=0) // width + 1
        shards = [shard.file_index * self._stride + shard.start // width for shard in plan if shard.part_name in kept]
        self._shards = np.array(shards, np.int64)

    def holds(self, keys: Keys) -> NDArray[np.bool_]:
        return np.isin(keys.file_index.astype(np.int64) * self._stride + keys.row // self._width, self._shards)


def read_chain(store: Store) -> Chain:
    """Read and check all claims; an empty chain when there are none.

    Raises:
        SpecError: the output belongs to a job that isn't incremental.
        InfrastructureError: a claim is missing, damaged, or not the one that its successor knew.
    """
    names = store.list(CHAIN)
    numbers = sorted(int(match[1]) for name in names if (match := _CLAIM.match(name)))
    if not numbers:
        refuse_plain_run(store)
    links: list[Link] = []
    for number in numbers:
        name = f"{CHAIN}/{number:06d}.json"
        released = f"{number:06d}.released.json"
        link = _read_link(store, name, released=f"{CHAIN}/{released}" if released in names else None)
        expected = links[-1].sha256 if links else None
        if link.claim.run != len(links) + 1 or link.claim.previous != expected:
            raise InfrastructureError(
                f"{store.root}/{name} doesn't follow on {f'{CHAIN}/{number - 1:06d}.json'}: a claim is missing or was "
                f"changed; restore {store.root}/{CHAIN} as it was, or start in an empty output.path"
            )
        links.append(link)
    return Chain(store, tuple(links))


def refuse_plain_run(store: Store) -> None:
    """Raise SpecError when the output itself is a run's: its rows are in no chain."""
    try:
        store.size(FINGERPRINT)
    except (FileNotFoundError, NotADirectoryError):
        return
    raise SpecError(
        f"output {store.root} holds a run of its own, without input.new: since_last_run; its rows can't be told from "
        "new ones. Choose an empty output.path"
    )


def refuse_job_directory(store: Store) -> None:
    """Raise SpecError when the output is that of an incremental job: a plain run would lie beside its runs."""
    if any(map(_CLAIM.match, store.list(CHAIN))):
        raise SpecError(
            f"output {store.root} holds the runs of a job with input.new: since_last_run; set that again to go on with "
            "it, or choose an empty output.path"
        )


def latest_run(path: str) -> str:
    """The output of the latest run of an incremental job's directory; any other path unchanged."""
    store = Store(path)
    if not any(map(_CLAIM.match, store.list(CHAIN))):
        return path
    chain = read_chain(store)
    return chain.run_store(chain.effective[-1]).root if chain.effective else path


def put_object(store: Store, name: str, data: bytes) -> StoredObject:
    """Store what a claim is going to name, under a name of its own."""
    full = f"{OBJECTS}/{uuid.uuid4().hex}-{name}"
    store.put(full, data)
    return StoredObject(full, hashlib.sha256(data).hexdigest())


def put_keys(store: Store, keys: Keys) -> StoredObject:
    """Store keys of rows for `Chain.keys_of`."""
    sink = io.BytesIO()
    pq.write_table(keys.to_table(), sink, row_group_size=_ROWS_AT_ONCE, compression="zstd")
    return put_object(store, "keys.parquet", sink.getvalue())


def sweep_objects(chain: Chain) -> int:
    """Remove what was stored for claims that were never made; only for who owns the job's output. Returns how many."""
    claims = [link.claim for link in chain.links]
    named = {each.name for claim in claims for each in (claim.plan, claim.keys) if each is not None}
    orphans = [name for name in chain.store.list(OBJECTS) if f"{OBJECTS}/{name}" not in named]
    for name in orphans:
        chain.store.delete(f"{OBJECTS}/{name}")
    return len(orphans)


def _read_link(store: Store, name: str, *, released: str | None) -> Link:
    data = store.read(name)
    try:
        release = None if released is None else Release.from_bytes(store.read(released))
        return Link(Claim.from_bytes(data), hashlib.sha256(data).hexdigest(), release)
    except (ValueError, KeyError, TypeError) as error:
        raise InfrastructureError(
            f"{store.root}/{name} can't be understood ({error}); restore that file, or start in an empty output.path"
        ) from error


def _read_object(store: Store, stored: StoredObject) -> bytes:
    try:
        data = store.read(stored.name)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        raise InfrastructureError(
            f"{store.root}/{stored.name} is missing or was changed; restore it, or start in an empty output.path"
        )
    return data


def _create(store: Store, name: str, data: bytes) -> None:
    try:
        store.create(name, data)
    except FileExistsError as error:
        raise InfrastructureError(
            f"{store.root}/{name} was created by another run at this moment; rerun the same command"
        ) from error
