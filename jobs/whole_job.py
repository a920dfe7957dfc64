"""Whatever a spec asks for, from its first run to its last: a plain run, a synthesis with its steps, or what is new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.incremental import run_if_incremental
from jobs.job_spec import JobSpec
from jobs.prepare import PreparedJob, prepare
from jobs.process_priority import stand_back
from jobs.report import id_warnings
from jobs.run import RunOptions, run_job
from jobs.synthesis import run_synthesis


def run_whole(
    spec: JobSpec,
    options: RunOptions,
    *,
    say: Callable[[str], None],
    finished: Callable[[PreparedJob, dict[str, Any]], None],
) -> dict[str, Any]:
    """Do the job; `finished` is called with each run's end. Returns the summary, or of an incremental job a report.

    Raises:
        RunError: as `run_job`.
    """
    if spec.fleet.attach is not None:  # others use that fleet, and people may wait for it
        stand_back()
    if (report := run_if_incremental(spec, options, say=say, finished=finished)) is not None:
        return report
    job = prepare(spec)
    for line in id_warnings(job):
        say(line)
    summary = (run_job if spec.synthesize is None else run_synthesis)(job, options, say=say)
    finished(job, summary)
    return summary
