"""`kind: synthesize` in a spec: what is refused, and where."""

from __future__ import annotations

import re

import pytest

from jobs.spec import parse_spec
from pipeline.errors import SpecError

SPEC = """\
name: tickets
kind: synthesize
model: {source: tiny}
input: {path: in.parquet}
prompt: {template: "{{ tone }} {{ text }}"}
synthesize:
  samplers: {tone: {category: {polite: 3, angry: 1}}, year: {range: [1990, 2000]}, who: {persona: p.txt}}
output: {path: out}
"""


def test_a_synthesis_needs_no_section_of_its_own() -> None:
    spec = parse_spec("kind: synthesize\n" + re.sub("(?s)kind.*?\n|synthesize:.*?\n.*?\n", "", SPEC), name="job.yaml")
    assert spec.synthesize is not None
    assert (spec.synthesize.retries, spec.synthesize.duplicates.near) == (2, 0.8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=complete", "`synthesize` is given, but `kind` isn't"),
        ("synthesize.samplers.tone.category=[]", "there is nothing to draw"),
        ("synthesize.samplers.tone.persona=x", "exactly one of `category`, `persona` and `range`"),
        ("synthesize.samplers.year.range=[3, 1]", "3 is more than 1"),
        ("synthesize.samplers={the tone: {range: [1, 2]}}", "can't be a column of a template"),
        (
            "synthesize={samplers: {conversation: {range: [1, 2]}}, conversation: {turns: 2, user: '{{ text }}'}}",
            "what the prompt for the user's turns calls the talk so far",
        ),
        ("synthesize.filters.matches='('", "no regular expression"),
        ("synthesize.filters.rejects='(?=a)'", "no regular expression"),
        ("synthesize.duplicates.near=0.1", "must be a number from 0.5 to 1"),
        ("synthesize.filters.languages=[German]", "`synthesize.filters.languages[0]` is German"),
        (
            "synthesize.judge={instructions: x, scores: {1: no, 2: yes}, keep_from: 1}",
            "keeps all or none of the scores",
        ),
        ("synthesize.judge={instructions: x, scores: {a: no, 2: yes}, keep_from: 2}", "`synthesize.judge.scores.a`"),
        (
            "synthesize.judge={instructions: '{{ x', scores: {1: no, 2: yes}, keep_from: 2}",
            "unexpected end of template",
        ),
        ("synthesize.retires=1", "did you mean `synthesize.retries`"),
        ("input.new=since_last_run", "a synthesis takes no `input.new: since_last_run`"),
        ("sampling.json_schema={uniqueItems: true}", 'Unimplemented keys: ["uniqueItems"]'),
        ("sampling.json_schema={$ref: 'https://example.com'}", "leads elsewhere"),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(SPEC, name="job.yaml", overrides=[override])
    assert message in caught.value.message
