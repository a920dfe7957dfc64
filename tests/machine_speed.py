"""Limits on processor time that hold on a busy machine too: neighbours on a core make every instruction slower."""

from __future__ import annotations

import ast
import contextlib
import gc
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Self

# What the two take on the idle machine for which limits are written, where `validate` takes 0.26 s; on one without
# AVX-512 whose clock is lower they took 0.0135 s and 0.117 s, and `validate` 0.34 s.
WORK_S = 0.0075
PROCESS_S = 0.09
_SOURCE = "\n".join(f"def f{n}(a, b={n}):\n    return [a * b + {n}, 'x{n}', {{'k': a}}]" for n in range(120))
_PROCESS = (sys.executable, "-c", "import typer, pydantic")


@contextlib.contextmanager
def quiet_heap() -> Iterator[None]:
    """Keep what earlier tests have left out of the collector's sight, which goes through all of it again and again.

    A text refused in 0.25 s of an own process took 1.1 s at the end of a suite.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Slowdown:
    """The larger of `start_slowdown` before and after a block."""

    def __enter__(self) -> Self:
        self.factor = start_slowdown()
        return self

    def __exit__(self, *_: object) -> None:
        self.factor = max(self.factor, start_slowdown())


def slowdown() -> float:
    """How many times slower than there a fixed piece of Python runs now; at least 1."""
    return max(1.0, min(_work() for _ in range(5)) / WORK_S)


def wall_slowdown() -> float:
    """How many times longer by the clock it takes, on average over 20: what a process with neighbours gets."""
    began = time.monotonic()
    for _ in range(20):
        _work()
    return max(1.0, (time.monotonic() - began) / 20 / WORK_S)


def start_slowdown() -> float:
    """The same for a process that starts and imports what every command needs."""
    return max(1.0, min(processor_time(_PROCESS) for _ in range(5)) / PROCESS_S)


def processor_time(command: tuple[str, ...]) -> float:
    """Seconds of processor time, user and system, that a command takes, which must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _work() -> float:
    began = time.process_time()
    compile(ast.parse(_SOURCE), "x", "exec")
    sum(hash(str(number)) & 1 for number in range(10_000))
    return time.process_time() - began
