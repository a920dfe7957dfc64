"""`input.format: openai_batch` in a spec: what it expands to, and what is refused."""

from __future__ import annotations

import re

import pytest

from jobs.spec import parse_spec
from pipeline.errors import SpecError

SPEC = """\
name: batch
model: {source: tiny}
input: {path: requests.jsonl, format: openai_batch}
output: {path: out}
"""


def test_requests_bring_their_prompt_and_fail_alone() -> None:
    spec = parse_spec(SPEC, name="job.yaml")
    assert (spec.prompt.messages, spec.prompt.template, spec.limits.max_failed_fraction) == ("body", None, 1.0)


def test_what_is_said_about_failures_and_markers_stands() -> None:
    spec = parse_spec(SPEC + "limits: {max_failed_fraction: 0.2}\nprompt: {marker_text: reject}\n", name="job.yaml")
    assert (spec.prompt.messages, spec.prompt.marker_text, spec.limits.max_failed_fraction) == ("body", "reject", 0.2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompt.template='{{ text }}'", "`prompt.template` says nothing with `input.format: openai_batch`"),
        ("prompt.messages=chat", "`prompt.messages` says nothing with"),
        ("prompt.system=Be brief", "`prompt.system` says nothing with"),
        ("sampling.column=s", "`sampling.column` says nothing with `input.format: openai_batch`: each request brings"),
        ("input.id=key", "`input.id` says nothing with `input.format: openai_batch`: `custom_id` is the id"),
        ("input.new=since_last_run", "`input.new` says nothing with"),
        ("input.format=openai", "`input.format` is openai, but must be `auto` or `openai_batch`"),
        ("limits=3", "`limits` is 3, but must be a mapping"),
    ],
)
def test_what_says_nothing_is_refused_and_is_the_only_error(override: str, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as error:
        parse_spec(SPEC, name="job.yaml", overrides=[override])
    assert "errors" not in error.value.message.splitlines()[0]


def test_a_labelling_job_over_a_batch_file_is_refused() -> None:
    with pytest.raises(SpecError, match="requests say themselves what to do"):
        parse_spec(SPEC + "kind: label\nlabel: {text: body, choices: [a, b]}\n", name="job.yaml")
