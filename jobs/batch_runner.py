"""Starts the processes that work at batches, on the machine of the endpoint that they belong to.

Made where an endpoint is started and used where it runs: what it works with is imported there, OpenAI's types 0.4 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jobs
from pipeline import local_objects

if TYPE_CHECKING:
    from openai.types import BatchRequestCounts

    from cluster.batch_queue import Served
    from cluster.batch_records import BatchFolder
    from cluster.batch_states import Step

MODULE = "jobs.batch_process"
_KEPT = ("RAY_AUTH_", "RAY_TMPDIR")
"""Of Ray's variables: the others are those of the actor that the endpoint is, and none of a driver's."""


class ProcessRunner:
    """A `cluster.batch_queue.BatchRunner`."""

    def start(self, step: Step, folder: Path, served: Served) -> subprocess.Popen[bytes]:
        """Start `jobs.batch_process`; it ends when we do."""
        from cluster.batch_records import LOG, BatchFolder

        if step == "run":
            keep_spec(BatchFolder(folder), served)
        words = [step, str(folder), served.address, served.fleet, str(os.getpid())]
        command = [sys.executable, "-P", "-m", MODULE, *words]
        with (folder / LOG).open("ab") as log:
            return subprocess.Popen(
                command,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is the endpoint's, which then ends its batches one way only
            )

    def counts(self, folder: Path) -> BatchRequestCounts | None:
        """As the run's own progress says, which is some two seconds old."""
        from openai.types import BatchRequestCounts

        from cluster.batch_records import RUN
        from jobs.progress import PROGRESS

        try:
            progress = json.loads((folder / RUN / PROGRESS).read_bytes())
        except FileNotFoundError:
            return None
        failed = progress["rows_failed"]
        done = progress["rows_done"]
        return BatchRequestCounts(total=progress["rows_total"], completed=max(0, done - failed), failed=failed)


def keep_spec(batch: BatchFolder, served: Served) -> None:
    """Write the batch's spec, once: settings of a later endpoint would make its rows those of another job."""
    from cluster.batch_records import SPEC
    from jobs.batch_spec import batch_spec

    path = batch.path / SPEC
    if not path.exists():
        spec = batch_spec(batch.facts().created, batch.path, served)
        local_objects.replace(str(path), json.dumps(spec, indent=1).encode())


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name.startswith(_KEPT)}
    code = str(Path(jobs.__path__[0]).parent)
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [code, kept.get("PYTHONPATH")]))}
