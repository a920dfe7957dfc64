"""Rules about `input.new: since_last_run`: what tells old from new must be said, and nothing that wouldn't count."""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterator

from jobs.yaml_source import FieldPath, Problem
from pipeline.settings import InputSettings, OutputSettings

SINCE_LAST_RUN = "since_last_run"


def check_incremental(source: InputSettings | None, output: OutputSettings | None) -> Iterator[Problem]:
    """Broken rules between the fields of `input` that say which rows are new."""
    if source is None:
        return
    if source.new != SINCE_LAST_RUN:
        yield from _check_idle(source)
        return
    if source.new_by == "id" and source.id is None:
        yield Problem(("input", "new_by"), "`input.new_by: id` needs an id column", hint="set `input.id`")
    if source.new_by == "partition" and source.partition is None:
        hint = "set `input.partition` to the key in the paths, e.g. date for .../date=2026-11-20/..."
        yield Problem(("input", "new_by"), "`input.new_by: partition` needs the name of the partition", hint=hint)
    if source.new_by != "partition" and source.partition is not None:
        message = f"`input.partition` is {source.partition}, but `input.new_by` is {source.new_by}"
        yield Problem(("input", "partition"), message, hint="set `input.new_by: partition`, or leave it out")
    if source.new_by == "content" and source.changed == "redo":
        message = "`input.changed: redo` says nothing with `input.new_by: content`: what changed is new"
        yield Problem(("input", "changed"), message, hint="leave it out, or set `input.new_by: id`")
    if source.limit is not None:
        message = f"`input.limit` is {source.limit}, but a run since the last one takes all new rows"
        yield Problem(("input", "limit"), message, hint="leave it out, or try the job with `tramontane preview`")
    if output is not None and output.resume != "if_possible":
        message = f"`output.resume` is {output.resume}, but each run since the last one has a folder of its own"
        yield Problem(("output", "resume"), message, hint="leave it out")
    yield from _check_timezone(source)


def _check_idle(source: InputSettings) -> Iterator[Problem]:
    default = InputSettings(path="")
    for name in ("new_by", "changed", "partition", "timezone"):
        if getattr(source, name) != getattr(default, name):
            path: FieldPath = ("input", name)
            message = f"`input.{name}` is {getattr(source, name)}, but every run takes all rows"
            yield Problem(path, message, hint="set `input.new: since_last_run`, or leave it out")


def _check_timezone(source: InputSettings) -> Iterator[Problem]:
    if source.timezone == "UTC":
        return
    path: FieldPath = ("input", "timezone")
    if source.new_by != "partition":
        message = f"`input.timezone` is {source.timezone}, but `input.new_by` is {source.new_by}"
        yield Problem(path, message, hint="only days of `input.new_by: partition` have one; leave it out")
        return
    try:
        zoneinfo.ZoneInfo(source.timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        hint = "give a name of the tz database, such as Europe/Paris or UTC"
        yield Problem(path, f"`{source.timezone}` is no time zone known here", hint=hint)
