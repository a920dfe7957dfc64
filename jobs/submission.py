"""What a submitted run is called, what it is told, and what became of it. Pure; knows nothing of HTTP.

Guarantees:
- a run's id is that of its output: who submits the same run twice, from wherever, meets the first.
- the exit code of a submitted run is decided by its job's state and its driver's exit code, by nothing that was logged.
- what is handed to the cluster refers to secrets by name, or it is refused.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jobs.job_spec import JobSpec
from pipeline.errors import SpecError
from pipeline.storage import split_url

DRIVER_MODULE = "jobs.submitted"
"""What the cluster runs."""
SPEC_FILE = "job.yaml"
NAME_KEY, OUTPUT_KEY, NONCE_KEY = "tramontane_job", "tramontane_output", "tramontane_nonce"
"""Of a Ray job's metadata, which `list` reads."""
LIVE = ("PENDING", "RUNNING")
_OWN_EXIT_CODES = frozenset({0, 1, 2, 3, 130})
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]{0,127})\}")
_SECRETIVE = re.compile(r"(?i)key|secret|token|passw|credential|auth|cookie|signature")
_STOP_MARGIN_S = 45
"""Beyond `limits.drain_timeout_s`: dropping what isn't finished (10 s), freeing GPUs, writing the summary."""


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """A job on a cluster, as its Ray tells it. Holds nothing of its environment."""

    id: str
    state: str
    """pending, running, succeeded, failed or stopped."""
    exit_code: int | None
    """The run's, as `run` would have ended; None while it lives."""
    name: str | None
    """The spec's; None for a job of somebody else."""
    output: str | None
    nonce: str | None
    """Tells this submission from another under the same id."""
    started_at: str | None
    """UTC, ISO 8601; likewise `ended_at`."""
    ended_at: str | None
    message: str | None
    """Ray's, of how it is or ended; the last line of it where it is a log."""

    @property
    def is_live(self) -> bool:
        """Whether it may still do anything."""
        return self.exit_code is None


def submitted_job(details: Any) -> SubmittedJob:
    """What matters of Ray's `JobDetails`."""
    metadata = details.metadata or {}
    state = str(getattr(details.status, "value", details.status))
    return SubmittedJob(
        id=details.submission_id or details.job_id or "",
        state=state.lower(),
        exit_code=exit_code_of(state, details.driver_exit_code),
        name=metadata.get(NAME_KEY),
        output=metadata.get(OUTPUT_KEY),
        nonce=metadata.get(NONCE_KEY),
        started_at=_instant(details.start_time),
        ended_at=_instant(details.end_time),
        message=_last_line(details.message),
    )


def exit_code_of(state: str, driver_exit_code: int | None) -> int | None:
    """The exit code that a job's state stands for; None for one that lives.

    A stopped job is interrupted (130). A failed one without a code of ours (its node lost, killed by a signal or for
    memory, never started) is infrastructure (3): safe to submit again.
    """
    if state in LIVE:
        return None
    if state == "SUCCEEDED":
        return 0
    if state == "STOPPED":
        return 130
    return driver_exit_code if driver_exit_code in _OWN_EXIT_CODES - {0} else 3


def identity(spec: JobSpec) -> str:
    """The id of a run: its job's name and its output, as eight hexadecimal digits."""
    digest = hashlib.sha256(spec.output.path.rstrip("/").encode()).hexdigest()
    return f"{spec.name}-{digest[:8]}"


def next_id(base: str, known: Mapping[str, SubmittedJob]) -> str:
    """The id of a run's next submission: the identity, then `.2`, `.3`, ...; Ray takes none twice.

    Raises:
        SpecError: an earlier submission lives.
    """
    earlier = submissions(base, known.values())
    for job in earlier:
        if job.is_live:
            raise SpecError(
                f"{job.id} is {job.state}, and has the same output; follow it with `tramontane logs {job.id} -f`, or "
                f"stop it with `tramontane stop {job.id}`"
            )
    return base if not earlier else f"{base}.{_number(base, earlier[-1].id) + 1}"


def submissions(base: str, jobs: Iterable[SubmittedJob]) -> list[SubmittedJob]:
    """All submissions of a run, the latest last."""
    pattern = re.compile(rf"{re.escape(base)}(\.[1-9]\d*)?")
    return sorted((job for job in jobs if pattern.fullmatch(job.id)), key=lambda job: _number(base, job.id))


def checked_id(wanted: str, known: Mapping[str, SubmittedJob]) -> str:
    """An id that the user chose, if it is one and free.

    Raises:
        SpecError: it isn't.
    """
    if not _ID.fullmatch(wanted):
        raise SpecError(f"--id {wanted!r}: use letters, digits, dot, dash and underscore, at most 100")
    if wanted in known:
        job = known[wanted]
        cure = f"follow it with `tramontane logs {wanted} -f`" if job.is_live else "choose another, or leave --id out"
        raise SpecError(f"--id {wanted} was submitted before, and is {job.state}; a cluster takes an id once: {cure}")
    return wanted


def entrypoint(job_id: str, overrides: Sequence[str], flags: Sequence[str]) -> str:
    """The shell command that the cluster runs."""
    settings = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["python", "-m", DRIVER_MODULE, job_id, SPEC_FILE, *settings, *flags])


def environment(assignments: Sequence[str], *, drain_timeout_s: float) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The job's variables as Ray takes them, and which of the cluster's own variables each of them refers to.

    Every process of the job gets them. Ray puts what the cluster's own environment holds in the place of `${NAME}` on
    each node, so a secret is there where it is used, and nowhere in what Ray keeps and shows of the job.

    Args:
        assignments: `NAME=value` or `NAME=${env:OTHER}`.
        drain_timeout_s: what the run may take to finish its shards when it is stopped.

    Raises:
        SpecError: an assignment is none, or would show a secret.
    """
    variables, references = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(drain_timeout_s) + _STOP_MARGIN_S)}, {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not _VARIABLE.fullmatch(name) or name.startswith("RAY_"):
            raise SpecError(f"--env {name!r}: write NAME=value or NAME='${{env:OTHER}}'; RAY_* are Ray's own")
        referred = _REFERENCE.findall(value)
        plain = _REFERENCE.sub("", value)
        if _SECRETIVE.search(name) and (plain or not referred):
            raise SpecError(
                f"--env {name}: a value given here is shown to all who may list the cluster's jobs; name the variable "
                f"of the cluster's own environment that holds it: --env {name}='${{env:{name}}}'"
            )
        if "$" in plain:
            raise SpecError(f"--env {name}: a `$` stands for nothing but ${{env:OTHER}}; write that, or leave it out")
        variables[name] = _REFERENCE.sub(r"${\1}", value)
        if referred:
            references[name] = referred
    return variables, references


def files_to_send(spec: JobSpec) -> list[str]:
    """Small local files that a spec names beside its rows, by relative paths: schemas' models, values of samplers."""
    named = [*spec.files, *(each.persona for each in (spec.synthesize.samplers.values() if spec.synthesize else ()))]
    local = [split_url(path)[1] for path in named if path is not None and split_url(path)[0] == "file"]
    return sorted({path for path in local if not path.startswith(("/", "~"))})


def refuse_own_disk(spec: JobSpec) -> None:
    """Refuse paths that mean this machine's working directory, which no cluster has.

    Rows aren't sent along: a run is recognised by where its rows lie, and goes on where it stopped only there.

    Raises:
        SpecError: there are such paths.
    """
    paths = [("output.path", spec.output.path)]
    paths += [
        ("input.path", path) for path in ([spec.input.path] if isinstance(spec.input.path, str) else spec.input.path)
    ]
    for field, path in paths:
        scheme, rest = split_url(path)
        if scheme == "file" and not rest.startswith("/"):
            raise SpecError(
                f"{field} {path} is relative to a folder of this machine, which the cluster doesn't have; use s3://, "
                "gs:// or abfs://, or the absolute path of a folder that the cluster's head has mounted"
            )
    source = spec.model.source
    if source.startswith(("./", "../", "~")):
        raise SpecError(f"model.source {source} is on this machine; use a URL, a Hugging Face id or an absolute path")


def _number(base: str, job_id: str) -> int:
    return int(job_id.removeprefix(base).removeprefix(".") or 1)


def _instant(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _last_line(message: str | None) -> str | None:
    lines = [line for line in (message or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else None
