"""One child process that renders templates under limits, from this side of its pipes.

Owns the process and the protocol that `jinja_child` describes. Knows nothing of which rows to send. Invariant: after an
error other than a row's own, the process is gone or about to be dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import jinja_child
from pipeline.errors import RowError
from pipeline.jinja_child import CLOCK_FACTOR, FAILED, HEADER, LENGTH, ChatDialect

if TYPE_CHECKING:
    import pyarrow as pa

STAGE = "template"

# The child's own timer fires first; this is for a child that is stopped, swapped out or gone silent.
_GRACE_S = 3.0
_START_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one row may cost. Memory is what the child may grow by, over about 70 MiB that it starts with."""

    timeout_s: float = 2.0
    memory_mib: int = 384
    output_mib: int = 8


def crashed(message: str) -> RowError:
    """Return the failure of a row whose child is gone for no reason of the row's."""
    return RowError("template_crash", f"the template process {message}", STAGE)


class RenderProcess:
    """One running child process, ready to render rows, or chats in a dialect."""

    def __init__(self, templates: Sequence[str], limits: RenderLimits, *, chat: ChatDialect | None = None) -> None:
        self._limits = limits
        # Nothing of our environment but what Python needs: no credentials within a template's reach.
        kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TZDIR")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-B", jinja_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C.UTF-8"},
        )
        self._kill = weakref.finalize(self, _end, self._process)
        self._buffer = bytearray()
        self._compiled = False
        configuration = {
            "templates": list(templates),
            "chat": chat,
            "timeout_s": limits.timeout_s,
            "memory_mib": limits.memory_mib,
            "output_mib": limits.output_mib,
        }
        self._send(json.dumps(configuration).encode())

    def close(self) -> None:
        """Kill the process; it holds nothing worth keeping."""
        self._kill()

    def compiled(self) -> None:
        """Wait for the child to have compiled its templates; raises RowError when it can't."""
        answer = self._frame(_START_S)
        if isinstance(answer, RowError):
            raise answer
        self._compiled = True

    def render(self, table: pa.Table) -> Iterator[list[str] | RowError]:
        """Yield one answer per row; raises RowError at the row that ends the child."""
        self._send(_ipc_bytes(table))
        for _ in range(table.num_rows):
            yield self._frame(CLOCK_FACTOR * self._limits.timeout_s + _GRACE_S)

    def render_chat(self, values: Mapping[str, Any]) -> list[str] | RowError:
        """Return one chat's texts, or why the templates refused it; raises RowError when it ends the child."""
        self._send(json.dumps(values).encode())
        return self._frame(CLOCK_FACTOR * self._limits.timeout_s + _GRACE_S)

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None  # noqa: S101  for the type checker
        with contextlib.suppress(BrokenPipeError):  # a dead child is noticed when its answer is read
            self._process.stdin.write(LENGTH.pack(len(message)) + message)
            self._process.stdin.flush()

    def _frame(self, patience_s: float) -> list[str] | RowError:
        deadline = time.monotonic() + patience_s
        self._fill(HEADER.size, deadline)
        status, size = HEADER.unpack_from(self._buffer)
        self._fill(HEADER.size + size, deadline)
        payload = json.loads(bytes(self._buffer[HEADER.size : HEADER.size + size]))
        del self._buffer[: HEADER.size + size]
        if status == FAILED:
            kind, message = payload
            return RowError(kind, message, STAGE)
        texts: list[str] = payload
        return texts

    def _fill(self, size: int, deadline: float) -> None:
        assert self._process.stdout is not None  # noqa: S101  for the type checker
        pipe = self._process.stdout.fileno()
        readable = select.poll()  # not select(), which refuses descriptors above 1023
        readable.register(pipe, select.POLLIN)
        while len(self._buffer) < size:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not readable.poll(left_s * 1000):
                self._process.kill()
                self._process.wait()
                raise self._overtime()
            data = os.read(pipe, 1 << 20)
            if not data:
                raise self._lost()
            self._buffer += data

    def _overtime(self) -> RowError:
        limit_s = self._limits.timeout_s
        return RowError(
            "template_timeout", f"the template took more than the {limit_s:g} s of processor time a row may take", STAGE
        )

    def _lost(self) -> RowError:
        code = self._process.wait()
        if code in (-signal.SIGPROF, -signal.SIGALRM):
            return self._overtime()
        # 1: Python gave up while reading the row. SIGKILL: the kernel's out-of-memory killer.
        if code in (1, -signal.SIGABRT, -signal.SIGKILL) and self._compiled:
            message = f"the template needs more than {self._limits.memory_mib} MiB of memory"
            return RowError("template_memory", message, STAGE)
        return crashed(f"ended with exit status {code}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    process.wait()


def _ipc_bytes(table: pa.Table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
