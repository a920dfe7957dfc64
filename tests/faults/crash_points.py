"""Death at a chosen moment: wraps what the commit protocol calls (system calls, S3 requests) in a process about to die.

The program under test has no hook for this. Points are numbered in the order in which an undisturbed run meets them.
"""

from __future__ import annotations

import builtins
import os
import random
import signal
from collections.abc import Callable
from typing import Any, Self

FINISHED, GAVE_UP = 0, 7


class Crash:
    """Counts the points that a run passes, and dies at one of them."""

    def __init__(self, die_at: int | None, seed: int) -> None:
        self.passed = 0
        self._die_at = die_at
        self._random = random.Random(f"{die_at}-{seed}")
        self._unsynced: dict[str, str] = {}

    def reached(self) -> bool:
        """Pass one point; whether it is the chosen one."""
        self.passed += 1
        return self.passed - 1 == self._die_at

    def point(self) -> None:
        if self.reached():
            self.die()

    def die(self) -> None:
        if self._random.random() < 0.5:
            self._lose_power()
        if self._random.random() < 0.5:
            os._exit(137)
        os.kill(os.getpid(), signal.SIGKILL)

    def half(self, data: bytes) -> bytes:
        return data[: self._random.randrange(len(data))]

    def written(self, path: str) -> None:
        self._unsynced[path] = path

    def synced(self, path: str) -> None:
        self._unsynced.pop(path, None)

    def renamed(self, old: str, new: str) -> None:
        if old in self._unsynced:
            self._unsynced[new] = new

    def _lose_power(self) -> None:
        """What never was synced comes back cut short after a power failure."""
        for path in self._unsynced:
            if os.path.exists(path):
                os.truncate(path, self._random.randrange(os.path.getsize(path) + 1))


class _WatchedFile:
    def __init__(self, file: Any, path: str, crash: Crash) -> None:
        self._file, self._path, self._crash = file, path, crash
        crash.written(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._crash.point()
        if self._crash.reached():
            self._file.write(self._crash.half(data))
            self._file.flush()
            self._crash.die()
        count: int = self._file.write(data)
        self._file.flush()
        self._crash.point()
        return count


def watch_local(crash: Crash) -> None:
    """Put points before and after every system call that changes the disk."""
    from pipeline import local_objects

    def opened(path: str, mode: str) -> Any:
        crash.point()
        return _WatchedFile(builtins.open(path, mode), path, crash)

    def wrap(name: str, note: Callable[..., None] | None = None) -> None:
        call = getattr(os, name)

        def watched(*args: Any) -> Any:
            crash.point()
            answer = call(*args)
            if note is not None:
                note(*args)
            crash.point()
            return answer

        setattr(os, name, watched)

    local_objects.open = opened  # type: ignore[attr-defined]
    wrap("replace", crash.renamed)
    wrap("link", crash.renamed)
    wrap("fsync", lambda fd: crash.synced(os.readlink(f"/proc/self/fd/{fd}")))
    wrap("mkdir")
    wrap("unlink")


_CHANGES = {"put_object", "delete_object"}


def watch_s3(crash: Crash) -> None:
    """Put points before and after every request that changes the bucket, and one that loses the reply."""
    import s3fs.core
    from botocore.exceptions import ConnectionClosedError

    original = s3fs.core._error_wrapper

    async def wrapper(func: Any, *, args: Any = (), kwargs: Any = None, retries: int) -> Any:
        if func.__name__ not in _CHANGES:
            return await original(func, args=args, kwargs=kwargs, retries=retries)
        crash.point()
        lose_reply = crash.reached()

        async def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal lose_reply
            answer = await func(*args, **kwargs)
            if lose_reply:
                lose_reply = False
                raise ConnectionClosedError(endpoint_url="http://lost")
            return answer

        answer = await original(watched, args=args, kwargs=kwargs, retries=retries)
        crash.point()
        return answer

    s3fs.core._error_wrapper = wrapper


def run_and_die(environment: dict[str, str], root: str, die_at: int | None, seed: int, passed: Any) -> None:
    """Entry of the child: a mini run that dies at the point, or ends and reports how many points it passed."""
    os.environ.update(environment)
    from tests.faults.mini_run import mini_run

    crash = Crash(die_at, seed)
    (watch_s3 if root.startswith("s3://") else watch_local)(crash)
    mini_run(root)
    passed.value = crash.passed
    os._exit(FINISHED)
