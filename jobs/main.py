"""The process: runs a command, turns however it ended into one line and an exit code, and goes.

Invariants: what went wrong on the way never shows as exit code 1, which means "done, with too many failed rows"; a run
doesn't end because nobody reads what it says.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from jobs.cli import app
from pipeline.errors import RunError


def main(command: Callable[[], object] = app) -> None:
    """Entry point: run the command, then end the process."""
    # Imports make objects to keep: looking through them for garbage was 0.35 of the 1.3 s before a run starts Ray.
    # `ray_session` puts the thresholds back.
    gc.set_threshold(100_000, 20, 100)
    sys.stderr = _Unheard(sys.stderr)
    exit_code = _exit_code(command)
    if "ray" not in sys.modules:
        sys.exit(exit_code)
    # Ray 2.60's IO thread outlives `ray.shutdown` and at times crashes an interpreter that ends: 2 of 12 runs that were
    # interrupted while they started died of SIGSEGV instead of exiting with 130. There is nothing left to tidy up.
    logging.shutdown()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


class _Unheard:  # all of a stream, by delegation
    """Standard error that goes on, silent, when its reader is gone: `run 2>&1 | head -1`, a log shipper that died."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # of one that is being copied
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's."""
        with self._silenced():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        with self._silenced():
            self._stream.flush()

    @contextlib.contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # its reader is slow, not gone
            raise
        except OSError:  # a pipe, a terminal or a socket without its other end, a full disk
            _to_nowhere(self._stream)


def _exit_code(command: Callable[[], object]) -> int:
    """Run the command; turns a RunError into its message and exit code, and has a word to say when interrupted."""
    try:
        command()
    except RunError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    except SystemExit as end:
        # Typer turns Ctrl-C into this. Once rows are being done, `jobs.supervise` handles it, so none is yet.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            print("interrupted; what is committed is safe: rerun the same command", file=sys.stderr)
        if isinstance(end.__context__, BrokenPipeError):  # 1 of Typer's
            return _unread()
        return _once_read(end.code if isinstance(end.code, int) else int(end.code is not None))
    except KeyboardInterrupt:  # of a command that isn't Typer's
        print("interrupted; what is committed is safe: rerun the same command", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001
        # The last boundary: Python's own exit code 1 would read as "done, with too many failed rows".
        return _unexpected(error)
    return _once_read(0)


def _once_read(exit_code: int) -> int:
    """The code, if standard output is read; what is in its buffer would else fail at the end, with 120 or 0."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _unread()
    return exit_code


def _unread() -> int:
    """Nobody read a report to its end; what is left of it goes nowhere."""
    _to_nowhere(sys.__stdout__)
    return 3


def _to_nowhere(stream: TextIO | None) -> None:
    if stream is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # for what is in its buffer, and for processes started later
        os.close(nowhere)


def _unexpected(error: Exception) -> int:
    """Say what a command met that it has no words for, and return the exit code; runs explain storage themselves."""
    if isinstance(error, PermissionError):
        print(f"error: {error}; correct the path or the credentials", file=sys.stderr)
        return 2
    if isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError):
        print(f"error: {error}; see that the storage is there, then rerun", file=sys.stderr)
        return 3
    traceback.print_exception(error)
    print(f"error: unexpected {type(error).__name__}; committed rows are safe; rerun", file=sys.stderr)
    return 3
