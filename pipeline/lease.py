"""One owner per output directory: numbered epochs made by create-only puts, kept alive by a counter that moves.

    _run/lease/000007.json    who owns epoch 7; created once, never changed; the highest epoch is the owner
    _run/lease/000007.beat    a counter that its owner moves on; `released` when it is done

Knows nothing of runs beyond an id to show. Reads no wall clock: a challenger watches, for `ttl_s` on its own monotonic
clock, whether the counter moves. Invariant: the highest epoch is never deleted, so numbers only grow.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from pipeline.errors import InfrastructureError, SpecError
from pipeline.process_identity import ProcessIdentity, this_process
from pipeline.storage import Store

FOLDER = "_run/lease"
DEFAULT_TTL_S = 30.0
# ENOENT is what file systems that aren't for files, such as /proc, answer to mkdir.
_NEVER_WRITABLE = frozenset({errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT})
# Six beats per ttl: five can be lost or late before anybody may take over.
_BEATS_PER_TTL = 6
_RECORD = re.compile(r"^(\d{6,})\.(json|beat)$")
_STALE_TEMPORARY_S = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who made an epoch."""

    epoch: int
    token: str
    """Unique; tells this owner from one that wrote the same name on a store with weak create-only puts."""
    run_id: str
    since: str
    """UTC, for people."""
    ttl_s: float
    process: ProcessIdentity

    def __str__(self) -> str:
        return f"run {self.run_id} (host {self.process.host}, pid {self.process.pid}, since {self.since})"

    def to_bytes(self) -> bytes:
        """JSON, as in the epoch's object."""
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Owner:
        """Inverse of `to_bytes`."""
        fields = json.loads(data)
        return Owner(**{**fields, "process": ProcessIdentity(**fields["process"])})


@dataclass(frozen=True, slots=True)
class _Beat:
    token: str
    count: int
    released: bool


class Lease:
    """Ownership of one output by this process; a context manager that releases at its end. See `acquire_lease`.

    Guarantees:
    - of several processes that want a free output exactly one becomes its owner.
    - an output is taken over only when its owner released it, is gone, or was silent for its `ttl_s`; an owner that was
      silent and wakes fails its next `check`.
    """

    def __init__(self, store: Store, owner: Owner) -> None:
        self.owner = owner
        self._store = store
        self._count = 0
        self._lost: str | None = None
        self._confirmed_at = _now()
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    @property
    def epoch(self) -> int:
        """Number of this ownership; later owners have higher ones."""
        return self.owner.epoch

    def check(self) -> None:
        """Return if this process owns the output at this moment; cheap enough to call before every commit.

        Raises:
            InfrastructureError: another process took over, or ownership could not be confirmed in time.
        """
        if self._lost is None and _now() - self._confirmed_at > self.owner.ttl_s / 2:
            with contextlib.suppress(OSError, InfrastructureError):
                self._renew()
        if self._lost is None and _now() - self._confirmed_at > self.owner.ttl_s / 2:
            silence = _now() - self._confirmed_at
            raise InfrastructureError(
                f"{self._store.root} did not answer for {silence:.0f} s, so this run may have lost its output; "
                "what is committed is safe: rerun the same command"
            )
        if self._lost is not None:
            raise InfrastructureError(self._lost)

    def release(self) -> None:
        """Give the output up, so that the next owner needn't wait. Does nothing if it was lost or released before."""
        self._stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=self.owner.ttl_s)
        with self._renewing, contextlib.suppress(OSError):
            if self._lost is None:
                self._write_beat(released=True)
        self._lost = self._lost or f"this run has released {self._store.root}; nothing may be committed after that"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _start(self) -> None:
        self._renew()
        self._clean_up()
        self._thread.start()

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self.owner.ttl_s / _BEATS_PER_TTL):
            try:
                self._renew()
            except Exception as error:  # noqa: BLE001  a thread that ended would let the output look abandoned
                _log.warning("lease of %s not renewed, will try again: %r", self._store.root, error)
            if self._lost is not None:
                _log.error("%s", self._lost)
                return

    def _renew(self) -> None:
        """Confirm that no later epoch exists and move the counter on."""
        with self._renewing:
            if self._lost is not None or self._stop.is_set():
                return
            begun = _now()  # what counts is when the beat can have been seen first, not when its put returned
            self._find_loss()
            if self._lost is None:
                self._write_beat(released=False)
                self._confirmed_at = begun

    def _find_loss(self) -> None:
        current = current_owner(self._store)
        if current is None or current.token != self.owner.token:
            taker = str(current) if current else "somebody who removed the lease"
            self._lost = (
                f"{self._store.root} was taken over by {taker}: this run was silent for over {self.owner.ttl_s:g} s. "
                "What it committed is safe; it stops here"
            )

    def _write_beat(self, *, released: bool) -> None:
        self._count += 1
        beat = _Beat(self.owner.token, self._count, released)
        self._store.put(_beat_name(self.epoch), json.dumps(asdict(beat)).encode())

    def _clean_up(self) -> None:
        """Delete earlier epochs.

        A challenger that has listed before may then create one of those numbers again; it finds this higher epoch when
        it lists once more, as `_claim` always does, and withdraws.
        """
        for name in self._store.list(FOLDER):
            match = _RECORD.match(name)
            if match and int(match[1]) < self.epoch:
                self._store.delete(f"{FOLDER}/{name}")
        self._store.sweep(FOLDER, older_than_s=_STALE_TEMPORARY_S)


def acquire_lease(store: Store, *, run_id: str, ttl_s: float = DEFAULT_TTL_S) -> Lease:
    """Become the owner of the output, at once if it is free, released, or its owner's process here is gone.

    Otherwise watch the owner's counter: as soon as it moves the owner lives; unmoved for the owner's ttl, it is dead.

    Raises:
        SpecError: a live run owns the output (says which), or nothing may be written there.
        InfrastructureError: the storage doesn't answer.
    """
    try:
        return _acquire(store, run_id, ttl_s)
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno in _NEVER_WRITABLE:
            raise SpecError(f"output {store.root} can't be written to: {error}; correct output.path") from error
        raise InfrastructureError(f"output {store.root} can't be reached: {error}; rerun the same command") from error


def _acquire(store: Store, run_id: str, ttl_s: float) -> Lease:
    while True:
        owner = current_owner(store)
        if owner is not None and _is_alive(store, owner):
            raise SpecError(
                f"output {store.root} is in use by {owner}; wait until it ends, stop it, or choose another output.path"
            )
        lease = _claim(store, epoch=owner.epoch + 1 if owner else 1, run_id=run_id, ttl_s=ttl_s)
        if lease is not None:
            return lease


def current_owner(store: Store) -> Owner | None:
    """Return the latest owner, alive or not, released or not; None if there never was one."""
    while True:
        epoch = _highest_epoch(store)
        if epoch is None:
            return None
        try:
            return Owner.from_bytes(store.read(_record_name(epoch)))
        except FileNotFoundError:
            continue  # deleted since by a higher epoch's owner
        except (ValueError, TypeError, KeyError) as error:
            raise InfrastructureError(
                f"{store.root}/{_record_name(epoch)} is not a lease ({error}); make sure that no run uses this output, "
                f"then delete {FOLDER}"
            ) from error


def _claim(store: Store, *, epoch: int, run_id: str, ttl_s: float) -> Lease | None:
    """Try to make the epoch ours; None if somebody else was first."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = Owner(epoch, uuid.uuid4().hex, run_id, since, ttl_s, this_process())
    try:
        store.create(_record_name(epoch), owner.to_bytes())
    except FileExistsError:
        return None
    if _is_superseded(store, owner):
        return None
    lease = Lease(store, owner)
    lease._start()
    return lease


def _is_alive(store: Store, owner: Owner) -> bool:
    """Watch until the owner's counter moves (alive), or for its ttl."""
    first = _read_beat(store, owner)
    if (first and first.released) or owner.process.is_gone():
        return False
    _log.info("output %s belongs to %s; watching up to %g s whether it lives", store.root, owner, owner.ttl_s)
    deadline = _now() + owner.ttl_s
    while _now() < deadline:
        time.sleep(owner.ttl_s / _BEATS_PER_TTL / 4)
        beat = _read_beat(store, owner)
        if (beat and beat.released) or owner.process.is_gone():
            return False
        if beat is None and _is_superseded(store, owner):
            return False  # its counter was cleaned up and will never move; the caller looks at the later owner
        if beat is not None and beat != first:
            return True
    return False


def _is_superseded(store: Store, owner: Owner) -> bool:
    latest = current_owner(store)
    return latest is None or latest.token != owner.token


def _read_beat(store: Store, owner: Owner) -> _Beat | None:
    try:
        fields: dict[str, Any] = json.loads(store.read(_beat_name(owner.epoch)))
        beat = _Beat(**fields)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return beat if beat.token == owner.token else None


def _highest_epoch(store: Store) -> int | None:
    matches = (_RECORD.match(name) for name in store.list(FOLDER))
    return max((int(match[1]) for match in matches if match and match[2] == "json"), default=None)


def _record_name(epoch: int) -> str:
    return f"{FOLDER}/{epoch:06d}.json"


def _beat_name(epoch: int) -> str:
    return f"{FOLDER}/{epoch:06d}.beat"


def _now() -> float:
    """Seconds on a clock that never jumps and, where the system can, goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
