"""Rules about `input.new: since_last_run`: what must be said, and what would say nothing."""

from __future__ import annotations

import pytest

from jobs.spec import parse_spec
from pipeline.errors import SpecError

BASE = """
name: job
model: {source: tiny}
input: {path: in.parquet, new: since_last_run}
prompt: {template: "{{ text }}"}
output: {path: out}
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["input.new_by=id"], r"`input\.new_by: id` needs an id column\n.*set `input\.id`"),
        (["input.new_by=partition"], r"`input\.new_by: partition` needs the name of the partition"),
        (["input.partition=date"], r"`input\.partition` is date, but `input\.new_by` is file"),
        (["input.new_by=content", "input.changed=redo"], r"`input\.changed: redo` says nothing with `input\.new_by: c"),
        (["input.limit=5"], r"`input\.limit` is 5, but a run since the last one takes all new rows"),
        (["output.resume=never"], r"`output\.resume` is never, but each run since the last one has a folder"),
        (["input.timezone=Europe/Paris"], r"`input\.timezone` is Europe/Paris, but `input\.new_by` is file"),
        (["input.new_by=partition", "input.partition=d", "input.timezone=Mars"], r"`Mars` is no time zone known here"),
        (["input.new=all", "input.changed=redo"], r"`input\.changed` is redo, but every run takes all rows"),
        (["input.new=all", "input.new_by=content"], r"`input\.new_by` is content, but every run takes all rows"),
        (["input.new=yesterday"], r"yesterday"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_contradicts_an_incremental_job_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(BASE, name="job.yaml", overrides=overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["input.changed=redo"],
        ["input.id=key", "input.new_by=id", "input.changed=redo"],
        ["input.new_by=content"],
        ["input.new_by=partition", "input.partition=date", "input.timezone=Europe/Paris", "input.changed=redo"],
    ],
    ids=" ".join,
)
def test_every_way_to_tell_new_from_known_is_valid(overrides: list[str]) -> None:
    assert parse_spec(BASE, name="job.yaml", overrides=overrides).input.new == "since_last_run"
