"""The process that does one step of a batch: reads its file, or answers its requests by a run and writes the results.

    python -m jobs.batch_process check|run FOLDER RAY_ADDRESS FLEET PARENT

Guarantees:
- of several processes for one batch one works at a time; the others find its work done.
- it ends when the endpoint that started it does, as by an interrupt, and another one goes on where it stopped.
- whatever moment it is killed at, the results are those of an undisturbed run, under the same ids.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.batch_records import INPUT, SPEC, BatchFolder
from cluster.batch_states import is_over, is_to_end
from jobs.main import main
from jobs.process_priority import stand_back

_PR_SET_PDEATHSIG = 1


def do_step() -> None:
    """Do the step that the command line names.

    Raises:
        RunError: the run could not go on; trying again continues it.
    """
    step, path, address, fleet, parent = sys.argv[1:]
    _end_with(int(parent))
    stand_back()
    batch = BatchFolder(Path(path))
    with _alone(batch):
        if is_over(batch.facts()):
            return
        if step == "check":
            check(batch)
        else:
            answer(batch, address, fleet)


def check(batch: BatchFolder) -> None:
    """Read the file and note what is wrong with it."""
    from jobs.batch_check import check_requests

    created = batch.facts().created
    path = batch.path / INPUT
    num_requests, errors = check_requests(str(path), endpoint=created.endpoint, model=created.model)
    batch.note_checked(num_requests, errors)
    if errors:
        path.unlink(missing_ok=True)


def answer(batch: BatchFolder, address: str, fleet: str) -> None:
    """Answer all requests, or, if the batch is to end, none any more; then write what there is."""
    from jobs.batch_results import finish

    if not is_to_end(batch.facts(), time.time()):
        exit_code = _run(batch, address, fleet)
        if exit_code == 130 and not is_to_end(batch.facts(), time.time()):
            raise SystemExit(exit_code)
    finish(batch, now=time.time())


def _run(batch: BatchFolder, address: str, fleet: str) -> int:
    """`tramontane run` of the batch's spec, on the fleet that there is now: its name changes no result."""
    from jobs.prepare import prepare
    from jobs.run import RunOptions, run_job
    from jobs.spec import load_spec

    job = prepare(load_spec(batch.path / SPEC, [f"fleet.attach={json.dumps(fleet)}"]))
    options = RunOptions(quiet=True, ray=address, run_id=batch.path.name)
    return int(run_job(job, options, say=_say)["exit_code"])


@contextlib.contextmanager
def _alone(batch: BatchFolder) -> Iterator[None]:
    """Wait until no other process works at the batch; the kernel lets go of the lock of one that dies."""
    with (batch.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _end_with(parent: int) -> None:
    """Get a SIGTERM when the thread that started this process is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # gone before we asked
        raise SystemExit(130)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201  the batch's log


if __name__ == "__main__":
    main(do_step)
