"""The process: runs a command, turns however it ended into one line and an exit code, and goes.

Invariant: what went wrong on the way never shows as exit code 1, which means "done, with too many failed rows".
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable

from jobs.cli import app
from pipeline.errors import RunError


def main(command: Callable[[], object] = app) -> None:
    """Entry point: run the command, then end the process."""
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
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # of a command that isn't Typer's
        print("interrupted; what is committed is safe: rerun the same command", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001
        # The last boundary: Python's own exit code 1 would read as "done, with too many failed rows".
        return _unexpected(error)
    return 0


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
