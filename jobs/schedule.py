"""`schedule`: what an existing scheduler needs to run a spec by the clock. Plans nothing itself, and installs nothing.

Every run gets a folder of its own below `output.path`, named by the time that it was due, unless the job does only what
is new (`input.new: since_last_run`), which keeps such folders itself. So another try goes on where the first one
stopped, and the lease of the output refuses a second run beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cluster.fleet_file import FleetFile, ScheduleSettings
from cluster.manifests import manifest
from jobs.cron import Schedule, is_skipped, parse_schedule
from jobs.fleet_file_source import load_fleet_file
from jobs.job_spec import JobSpec
from jobs.manifest import read_job
from jobs.schedule_python import airflow, dagster
from jobs.schedule_texts import TICK, Command, crontab, systemd
from jobs.spec import load_spec
from jobs.submission import environment, refuse_own_disk
from pipeline.errors import SpecError

TEXTS: Mapping[str, Callable[[Command, Schedule], dict[str, str]]] = {
    "crontab": crontab,
    "systemd": systemd,
    "airflow": airflow,
    "dagster": dagster,
}
KUBERNETES = "kubernetes"
SCHEDULERS = (KUBERNETES, *TEXTS)
NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Wish:
    """A spec to run by the clock."""

    spec: Path
    schedule: Schedule
    scheduler: str
    overrides: Sequence[str] = ()
    address: str | None = None
    """Of the cluster to submit to; None to run where the scheduler does."""
    environment: Sequence[str] = ()
    """Of `submit --env`."""
    fleet: Path | None = None
    """The fleet file that a cluster on Kubernetes is made from."""
    raycronjob: bool = False
    """KubeRay's own, alpha, instead of a CronJob."""


def schedule_files(wish: Wish) -> dict[str, str]:
    """Texts by file name.

    Raises:
        SpecError: spec, scheduler or options are wrong, or don't go together.
    """
    if wish.scheduler not in SCHEDULERS:
        raise SpecError(f"--on {wish.scheduler!r} is unknown; use one of {', '.join(SCHEDULERS)}")
    spec = load_spec(wish.spec, wish.overrides)
    if wish.scheduler == KUBERNETES:
        return {"cronjob.yaml": _manifest(wish)}
    if wish.fleet is not None or wish.raycronjob:
        raise SpecError(f"--fleet and --raycronjob are for --on kubernetes; {wish.scheduler} needs neither")
    return TEXTS[wish.scheduler](command_of(wish, spec), wish.schedule)


def command_of(wish: Wish, spec: JobSpec) -> Command:
    """What is run at each tick."""
    words = ["run", str(wish.spec.absolute())]
    if wish.address is not None:
        refuse_own_disk(spec)
        environment(wish.environment, drain_timeout_s=spec.limits.drain_timeout_s)
        words = ["submit", str(wish.spec.absolute()), "--address", wish.address, "--attach"]
        words += [word for entry in wish.environment for word in ("--env", entry)]
    elif wish.environment:
        raise SpecError("--env is for --address: a run that isn't submitted has its scheduler's environment")
    words += [word for override in wish.overrides for word in ("--set", override)]
    if spec.input.new == "all":
        words += ["--set", f"output.path={spec.output.path.rstrip('/')}/{TICK}"]
    installed = Path(sys.executable).parent / "tramontane"
    program = str(installed) if installed.exists() else "tramontane"
    return Command(spec.name, program, words, str(Path.cwd()), int(spec.limits.drain_timeout_s))


def schedule_notes(schedule: Schedule, now: datetime) -> list[str]:
    """The next times it is due, and days on which that means something else."""
    times = schedule.next_times(now, NUM_SHOWN)
    lines = [
        f"{'next' if not index else '':<5} {time:%a %Y-%m-%d %H:%M %Z (UTC%z)}" for index, time in enumerate(times)
    ]
    for local in schedule.clock_changes(now):
        what = "doesn't exist" if is_skipped(local) else "happens twice"
        lines.append(
            f"note  {local:%Y-%m-%d %H:%M} {what} in {schedule.timezone}: some schedulers leave such a run out, "
            "some make up for it, some start it twice; a time that is there once every day avoids that"
        )
    return lines


def write_files(files: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the texts into a folder; their paths.

    Raises:
        SpecError: it can't be written to.
    """
    paths = []
    for name, text in files.items():
        path = folder / name
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SpecError(f"{path} can't be written: {error.strerror}; name a folder that exists") from None
        paths.append(path)
    return paths


def _manifest(wish: Wish) -> str:
    if wish.fleet is None:
        raise SpecError(
            "--on kubernetes makes a cluster for each run, and needs to know its machines: add --fleet FILE"
        )
    if wish.address is not None or wish.environment or wish.overrides:
        raise SpecError(
            "--on kubernetes takes no --address, --env or --set: each run has a cluster of its own, whose secrets are "
            "cluster.secrets of the fleet file, and the spec is mounted as it is"
        )
    file = load_fleet_file(wish.fleet)
    target = "raycronjob" if wish.raycronjob else "cronjob"
    return manifest(_scheduled(file, wish.schedule), target, read_job(wish.spec))


def _scheduled(file: FleetFile, schedule: Schedule) -> FleetFile:
    settings = ScheduleSettings(cron=schedule.cron, time_zone=schedule.timezone)
    return file.model_copy(update={"cluster": file.cluster.model_copy(update={"schedule": settings})})


__all__ = ["SCHEDULERS", "Wish", "command_of", "parse_schedule", "schedule_files", "schedule_notes", "write_files"]
