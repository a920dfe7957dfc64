"""Cron expressions and time zones: when a schedule is due. Pure, but for the zone database.

Only what every scheduler that we write for understands alike is accepted. Days on which clocks are changed are the one
thing in which they differ, and are pointed out.
Guarantees:
- times are those of cron on Debian: one that a change of clocks leaves out is made up for right after it, one that it
  repeats happens once.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from pipeline.errors import SpecError

TICK_FORMAT = "%Y-%m-%dT%H%MZ"
"""Of a run's folder below `output.path`, UTC; as `cluster.scheduled_rayjob` writes it."""
_VALUE = r"(\d{1,2}|[A-Za-z]{3})"
_ITEM = rf"(\*|{_VALUE}(-{_VALUE})?)(/\d{{1,2}})?"
_FIELD = re.compile(rf"{_ITEM}(,{_ITEM})*")
_LOOK_AHEAD_DAYS = 370


@dataclass(frozen=True, slots=True)
class Schedule:
    """When to run. Made by `parse_schedule`."""

    cron: str
    """Five fields with one blank between."""
    timezone: str
    """IANA name."""

    @property
    def zone(self) -> ZoneInfo:
        """The time zone."""
        return ZoneInfo(self.timezone)

    def next_times(self, after: datetime, count: int) -> list[datetime]:
        """The next times it is due, in its time zone."""
        return list(itertools.islice(self._times(after), count))

    def latest(self, now: datetime) -> datetime:
        """The time it was due last, `now` included."""
        found = next(CronSim(self.cron, (now + timedelta(seconds=1)).astimezone(self.zone), reverse=True))
        # Backwards, cronsim goes by the clock on the wall: in an hour that is shown twice it misses the first showing.
        while (following := self.next_times(found, 1)[0]) <= now:
            found = following
        return found

    def clock_changes(self, after: datetime) -> list[datetime]:
        """Local times within a year at which it should be due and that don't exist or happen twice, one a day."""
        if self.cron.split(" ")[1].startswith("*"):
            return []  # it runs before and after, whatever becomes of the hour between
        midnight = after.astimezone(self.zone).replace(tzinfo=None, hour=0, minute=0, second=0, microsecond=0)
        found = []
        for day in (midnight + timedelta(days=number) for number in range(_LOOK_AHEAD_DAYS)):
            next_day = day + timedelta(days=1)
            if day.replace(tzinfo=self.zone).utcoffset() == next_day.replace(tzinfo=self.zone).utcoffset():
                continue
            due = CronSim(self.cron, day - timedelta(seconds=1))
            local = (time.replace(tzinfo=self.zone) for time in itertools.takewhile(lambda time: time < next_day, due))  # noqa: B023
            found += list(itertools.islice((time for time in local if is_odd(time)), 1))
        return found

    def _times(self, after: datetime) -> CronSim:
        return CronSim(self.cron, after.astimezone(self.zone))


def parse_schedule(cron: str, timezone: str) -> Schedule:
    """Check both.

    Raises:
        SpecError: not five fields that every scheduler understands, never due, or no such time zone.
    """
    fields = cron.split()
    if len(fields) != 5 or not all(map(_FIELD.fullmatch, fields)):
        raise SpecError(
            f"--cron {cron!r}: give five fields, minute hour day month weekday, of numbers, names, `*`, `,`, `-` and "
            "`/` (L, W, # and @daily aren't understood everywhere), e.g. '0 2 * * *'"
        )
    if re.search(r"(?<!/)\b7\b", fields[4]):
        raise SpecError(f"--cron {cron!r}: write Sunday as 0 or SUN; Kubernetes takes no 7")
    try:
        zone = ZoneInfo(timezone)
        if timezone in ("localtime", "posixrules"):
            raise ZoneInfoNotFoundError(timezone)
        next(CronSim(" ".join(fields), datetime.now(UTC).astimezone(zone)))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise SpecError(f"--timezone {timezone!r} is no IANA time zone; give e.g. Europe/Paris or Etc/UTC") from None
    except (CronSimError, StopIteration) as error:
        said = f"{error}" or "it is never due"
        raise SpecError(f"--cron {cron!r}: {said}; correct it, e.g. '0 2 * * *'") from None
    return Schedule(" ".join(fields), timezone)


def tick_name(due: datetime) -> str:
    """A due time as the name of its run's folder."""
    return due.astimezone(UTC).strftime(TICK_FORMAT)


def is_odd(local: datetime) -> bool:
    """Whether clocks skip this local time, or show it twice."""
    return local.replace(fold=0).utcoffset() != local.replace(fold=1).utcoffset()


def is_skipped(local: datetime) -> bool:
    """Whether clocks skip it."""
    first, second = local.replace(fold=0).utcoffset(), local.replace(fold=1).utcoffset()
    return first is not None and second is not None and first < second
