"""What crontab and systemd need to run a command by the clock, as text. Pure.

Both are told: another try after exit code 3 (infrastructure), none after 1 (too many rows failed) and 2 (wrong spec, or
the output is in use), which would end the same way.
Guarantees:
- whatever a path or an argument holds, it reaches the program as it is; or it is refused.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from cronsim import CronSim

from jobs.cron import Schedule
from pipeline.errors import SpecError

TICK = "{tick}"
"""Stands in an argument for the time that a run was due."""
NUM_RETRIES = 2
RETRY_PAUSE_S = 300
_DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_STOP_MARGIN_S = 45
_LIMIT_S = (NUM_RETRIES + 2) * RETRY_PAUSE_S


@dataclass(frozen=True, slots=True)
class Command:
    """What is to be run."""

    name: str
    """Of the job: letters, digits, dot, dash, underscore."""
    program: str
    """The absolute path of `tramontane`, or its name."""
    arguments: Sequence[str]
    """`TICK` in them is the time that the run was due."""
    folder: str
    """Where; a spec's paths are relative to it."""
    stop_s: int
    """How long it may take to finish its shards when it is told to end."""

    @property
    def has_tick(self) -> bool:
        """Whether runs differ by their time."""
        return any(TICK in argument for argument in self.arguments)


def crontab(command: Command, schedule: Schedule) -> dict[str, str]:
    """Two lines for `crontab -e`; the second tries again by itself."""
    script = (
        f"cd {shlex.quote(command.folder)} && for attempt in {' '.join(map(str, range(NUM_RETRIES + 1)))}; do "
        f"{shlex.join(_words(command, schedule))}; code=$?; "
        f"[ $code -eq 3 ] || break; sleep {RETRY_PAUSE_S}; done; exit $code"
    )
    lock = f'"$HOME/.tramontane-{command.name}.lock"'
    # cron takes a bare % for the end of the line, and hands \\% on as %.
    line = f"{schedule.cron} flock -n -E 2 {lock} sh -c {shlex.quote(_one_line(script))}".replace("%", "\\%")
    note = [
        f"# {command.name}: add both lines with `crontab -e`; cron mails what it prints, or redirect it.",
        "# CRON_TZ is cronie's (Fedora, RHEL, Arch). Debian's and Ubuntu's cron uses the machine's time zone whatever",
        f"# it says: there, the machine's must be {schedule.timezone}, or take `--on systemd`.",
        "# Exit code 3 is tried again after 5 minutes, twice. While a run is going on, none is started: exit code 2.",
    ]
    return {"crontab": "\n".join([*note, f"CRON_TZ={schedule.timezone}", line]) + "\n"}


def systemd(command: Command, schedule: Schedule) -> dict[str, str]:
    """A service and its timer."""
    words = " ".join(_systemd_quoted(word) for word in _words(command, schedule))
    unit = f"tramontane-{command.name}"
    service = [
        f"# {unit}.service. Put both files into ~/.config/systemd/user (or /etc/systemd/system), then:",
        f"#   systemctl --user daemon-reload && systemctl --user enable --now {unit}.timer",
        f"#   journalctl --user -u {unit} -f",
        "[Unit]",
        f"Description=Tramontane job {command.name}",
        "# So many starts within so long: those that are due, and two repetitions.",
        f"StartLimitBurst={_most_starts(schedule) + NUM_RETRIES}",
        f"StartLimitIntervalSec={_LIMIT_S}",
        "",
        "[Service]",
        "Type=oneshot",
        f"WorkingDirectory={_systemd_path(command.folder)}",
        f"ExecStart={_one_line(words)}",
        "# 3 (infrastructure) is tried again; 1, 2 and 130 would end the same way, or were meant.",
        "Restart=on-failure",
        "RestartPreventExitStatus=1 2 130",
        f"RestartSec={RETRY_PAUSE_S}",
        "# Told to stop, it finishes the shards it has begun.",
        "KillMode=mixed",
        f"TimeoutStopSec={command.stop_s + _STOP_MARGIN_S}",
    ]
    timer = [
        f"# {unit}.timer. While a run is going on, systemd starts no other.",
        "[Unit]",
        f"Description=Tramontane job {command.name} at {schedule.cron} ({schedule.timezone})",
        "",
        "[Timer]",
        *(f"OnCalendar={event}" for event in calendar_events(schedule)),
        "# Made up for after the machine was off.",
        "Persistent=true",
        "AccuracySec=1s",
        "",
        "[Install]",
        "WantedBy=timers.target",
    ]
    return {f"{unit}.service": "\n".join(service) + "\n", f"{unit}.timer": "\n".join(timer) + "\n"}


def _most_starts(schedule: Schedule) -> int:
    """How often it is due within `_LIMIT_S` at most."""
    times = schedule.next_times(datetime(2026, 1, 1, tzinfo=UTC), 200)
    shortest_s = min((b - a).total_seconds() for a, b in pairwise(time.astimezone(UTC) for time in times))
    return math.ceil(_LIMIT_S / shortest_s)


def calendar_events(schedule: Schedule) -> list[str]:
    """The schedule as systemd's calendar events; two where cron means this day of the month or that weekday."""
    cron = CronSim(schedule.cron, datetime(2026, 1, 1))  # noqa: DTZ001  only what it parsed is of interest
    hours = f"{_listed(cron.hours, 24)}:{_listed(cron.minutes, 60)}:00"
    weekdays = {day % 7 for day in cron.weekdays if isinstance(day, int)}
    prefix = "" if len(weekdays) == 7 else ",".join(_DAYS[day] for day in sorted(weekdays)) + " "
    any_day = f"*-{_listed(cron.months, 12)}-*"
    given_day = f"*-{_listed(cron.months, 12)}-{_listed(cron.days, 31)}"
    if cron.day_and:
        return [f"{prefix}{given_day} {hours} {schedule.timezone}"]
    return [f"{given_day} {hours} {schedule.timezone}", f"{prefix}{any_day} {hours} {schedule.timezone}"]


def _words(command: Command, schedule: Schedule) -> list[str]:
    """The command line. It asks when it was due, not what time it is, so that another try means the same run."""
    due = ["tick", "--timezone", schedule.timezone, schedule.cron] if command.has_tick else []
    return [command.program, *due, *command.arguments]


def _one_line(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise SpecError(
            "a path or argument holds a line break or control character; a schedule's line can't, rename it"
        )
    return text


def _systemd_quoted(text: str) -> str:
    """One word of an Exec line: between quotes, % begins a specifier, $ a variable, and a backslash an escape."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _systemd_path(path: str) -> str:
    """Of WorkingDirectory, which knows % but neither $ nor quotes."""
    return _one_line(path).replace("%", "%%")


def _listed(values: set[int], count: int) -> str:
    return "*" if len(values) == count else ",".join(f"{value:02d}" for value in sorted(values))
