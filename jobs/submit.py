"""`submit`, `logs`, `list` and `stop`: runs on a cluster, from any machine that reaches its jobs API.

What can be seen to be wrong from here is refused here; the rest is checked by the job itself, on the cluster, before it
spends anything (`jobs.submitted`).
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.fleet_file_source import read_yaml_text
from jobs.follow import follow
from jobs.job_package import job_package
from jobs.progress import duration
from jobs.ray_jobs import JobsApi
from jobs.spec import load_spec, parse_spec
from jobs.submission import (
    NAME_KEY,
    NONCE_KEY,
    OUTPUT_KEY,
    SubmittedJob,
    checked_id,
    entrypoint,
    environment,
    files_to_send,
    identity,
    next_id,
    refuse_own_disk,
    submissions,
)
from pipeline.errors import InfrastructureError, SpecError

STOP_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Submission:
    """A spec to submit."""

    spec: Path
    overrides: Sequence[str] = ()
    environment: Sequence[str] = ()
    """`NAME=value` or `NAME=${env:OTHER}`."""
    id: str | None = None
    """Instead of the run's identity."""
    check: bool = True
    """Whether the cluster looks at everything before it runs."""
    retry_failed: bool = True
    driver_cpus: float = 0
    """CPUs that the driver takes, on whichever node has them; 0 for the head."""
    attach: bool = False
    """Whether to go on with the run's live submission where there is one: what a scheduler's second try wants."""


def submit(jobs: JobsApi, submission: Submission) -> SubmittedJob:
    """Start the job on the cluster, or find it there; how it is.

    Guarantees:
    - a run that is live on the cluster isn't submitted once more.
    - when the answer to the submission is lost, the job is found again, and there is one of it.

    Raises:
        SpecError: spec, id or environment are wrong, or the run is live already.
    """
    text = read_yaml_text(submission.spec, cure="`tramontane init` writes one to start from")
    spec = parse_spec(text, name=str(submission.spec), overrides=submission.overrides)
    refuse_own_disk(spec)
    variables, references = environment(submission.environment, drain_timeout_s=spec.limits.drain_timeout_s)
    known = jobs.jobs()
    live = [job for job in submissions(identity(spec), known.values()) if job.is_live]
    if live and submission.attach:
        return live[-1]
    next_of_run = next_id(identity(spec), known)
    job_id = checked_id(submission.id, known) if submission.id is not None else next_of_run
    flags = [*([] if submission.check else ["--no-check"]), *([] if submission.retry_failed else ["--no-retry-failed"])]
    command = entrypoint(job_id, submission.overrides, flags)
    nonce = secrets.token_hex(8)
    metadata = {NAME_KEY: spec.name, OUTPUT_KEY: spec.output.path, NONCE_KEY: nonce}
    with job_package(text, references, files_to_send(spec)) as folder:
        try:
            jobs.submit(
                job_id,
                command,
                folder=folder,
                variables=variables,
                metadata=metadata,
                num_cpus=submission.driver_cpus,
            )
        except InfrastructureError:
            # The answer may be what was lost.
            found = jobs.jobs().get(job_id)
            if found is None or found.nonce != nonce:
                raise
    return jobs.job(job_id)


def find(jobs: JobsApi, word: str) -> SubmittedJob:
    """The job that a word of the command line stands for: an id, or a spec's latest submission.

    Raises:
        SpecError: there is none.
    """
    if not (word.endswith((".yaml", ".yml")) and Path(word).is_file()):
        return jobs.job(word)
    found = submissions(identity(load_spec(word, runs_files=False)), jobs.jobs().values())
    if not found:
        raise SpecError(f"{word} wasn't submitted to {jobs.address} with this name and output; see `tramontane list`")
    return found[-1]


def stop(jobs: JobsApi, job: SubmittedJob, *, say: Callable[[str], None]) -> SubmittedJob:
    """Have a job finish the shards it has begun, and wait for its end; its last state.

    Ray ends it by force after the time that the job was submitted with.
    """
    if job.is_live and jobs.stop(job.id):
        say(f"{job.id} was asked to stop; it finishes what is begun, up to limits.drain_timeout_s")
    while (job := jobs.job(job.id)).is_live:
        time.sleep(STOP_POLL_S)
    return job


def follow_to_the_end(
    jobs: JobsApi, job_id: str, *, write: Callable[[str], None], say: Callable[[str], None]
) -> tuple[SubmittedJob | None, int]:
    """Follow a job; how it ended, and the exit code. Ctrl-C detaches: None and 130, and the job goes on."""
    try:
        job = follow(jobs, job_id, write=write, say=say)
    except KeyboardInterrupt:
        say(f"detached; {job_id} goes on. Follow it again: tramontane logs {job_id} -f --address {jobs.address}")
        return None, 130
    for line in ending_lines(job):
        say(line)
    return job, job.exit_code if job.exit_code is not None else 3


def ending_lines(job: SubmittedJob) -> list[str]:
    """How a job ended, and what next."""
    lines = [f"{job.id} {job.state} (exit {job.exit_code})"]
    if job.exit_code == 3:
        lines += [f"  {job.message}"] if job.message else []
        lines.append("  submit it again: it goes on where it stopped")
    if job.exit_code == 130:
        lines.append("  what is committed is safe; submit it again to go on")
    return lines


def job_lines(jobs: Sequence[SubmittedJob]) -> list[str]:
    """A table of jobs."""
    rows = [("id", "state", "exit", "started", "took", "output")]
    for job in jobs:
        code = "" if job.exit_code is None else str(job.exit_code)
        rows.append((job.id, job.state, code, job.started_at or "", _took(job), job.output or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def job_as_data(job: SubmittedJob) -> dict[str, Any]:
    """A job for programs."""
    return {name: value for name, value in dataclasses.asdict(job).items() if name != "nonce"}


def output_status(job: SubmittedJob) -> tuple[dict[str, Any] | None, list[str]]:
    """What a job's output says of its run, for programs and for people; None where it can't be read from here."""
    if job.output is None:
        return None, []
    from jobs.status import read_status, status_lines

    try:
        report = read_status(job.output)
    except Exception:  # noqa: BLE001  every client library of object stores has exceptions of its own
        return None, [f"{job.output} can't be read from this machine, or holds nothing yet"]
    return report, status_lines(report)


def _took(job: SubmittedJob) -> str:
    if job.started_at is None:
        return ""
    ended = datetime.fromisoformat(job.ended_at) if job.ended_at else datetime.now(UTC)
    return duration((ended - datetime.fromisoformat(job.started_at)).total_seconds())
