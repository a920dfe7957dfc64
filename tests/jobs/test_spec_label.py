"""`kind: label` in a spec: what it expands to, and what is refused."""

from __future__ import annotations

import re

import jinja2
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jobs.spec import parse_spec
from jobs.spec_label import label_prompt
from pipeline.errors import SpecError
from pipeline.settings import LabelSettings

SPEC = """\
name: tickets
kind: label
model: {source: tiny}
input: {path: in.parquet}
label:
  text: body
  choices: {billing: "money, invoices", bug: something is broken}
  examples: [{text: It crashes., label: bug}]
  abstain_below: 0.6
output: {path: out}
"""


def test_a_labelling_spec_becomes_a_prompt_with_examples() -> None:
    spec = parse_spec(SPEC, name="job.yaml")
    assert spec.label is not None
    assert spec.prompt.template == (
        "Choose the label that fits the text best.\n\nLabels:\n- billing: money, invoices\n- bug: something is broken"
        "\n\nText:\n{{ body }}\n\nAnswer with the label alone."
    )
    [example] = spec.prompt.examples
    assert (example.user.splitlines()[-3], example.assistant) == ("It crashes.", "bug")
    assert spec.sampling.temperature == 0


texts = st.text(st.characters(exclude_characters="\x00\x01\x02", exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(texts, texts, st.sampled_from(["{{ x }}", "{% raw %}", "{# c #}", "{{ '", "' }}", "}}{{"]))
def test_whatever_instructions_and_meanings_hold_stays_text(instructions: str, meaning: str, trap: str) -> None:
    label = LabelSettings(text="body", choices={"a": meaning + trap, "b": trap}, instructions=instructions + trap)
    template = jinja2.Environment(keep_trailing_newline=True, newline_sequence="\n").from_string
    rendered = template(label_prompt(label)["template"]).render(body="{{ the }} text")
    wanted = (instructions + trap).strip()
    assert (
        rendered.replace("\r\n", "\n").replace("\r", "\n").startswith(wanted.replace("\r\n", "\n").replace("\r", "\n"))
    )
    assert f"- b: {trap}\n\nText:\n{{{{ the }}}} text\n" in rendered


def changed(**fields: object) -> str:
    data = yaml.safe_load(SPEC)
    for name, value in fields.items():
        if value is None:
            del data[name]
        elif isinstance(value, dict):
            data[name] = {**data.get(name, {}), **value}
        else:
            data[name] = value
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(kind=None), "`label` is given, but `kind` is complete"),
        (changed(label=None), "`kind` is label, but there is no `label`"),
        (changed(label={"choices": ["one"]}), "give at least two"),
        (changed(label={"choices": ["a", "a", "bug"]}), "'a' twice"),
        (changed(label={"choices": [" a", "bug"]}), "begins or ends with a space"),
        (changed(label={"examples": [{"text": "x", "label": "bugs"}]}), "`bugs` is not one of the choices"),
        (changed(label={"text": "the body"}), "which can't be a column of a template"),
        (changed(label={"abstain_below": 2}), "`label.abstain_below` is 2, but must be a number from 0 to 1"),
        (changed(label={"chioces": ["a"]}), "did you mean `label.choices`?"),
        (changed(sampling={"temperature": 0.5}), "a labelling job draws no tokens"),
        (changed(prompt={"template": "{{ body }}"}), "a labelling job makes its own `prompt.template`"),
        (changed(kind="labels"), "did you mean `label`?"),
        (changed(label={"threshold": 0.4}), "`label.threshold` is given, but a row gets one label"),
        (changed(label={"multi": True}), "`label.multi` is true, so an example says what fits in `labels`"),
        (changed(label={"examples": [{"text": "x", "labels": ["bug"]}]}), "so an example says what fits in `label`"),
        (changed(label={"multi": True, "examples": [{"text": "x", "labels": ["bugs"]}]}), "`bugs` is not one of the"),
    ],
)
def test_what_makes_no_sense_is_refused_at_its_place(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, name="job.yaml")
    assert message in caught.value.message
    assert len(re.findall(r"^job\.yaml:\d+:\d+: ", caught.value.message, re.MULTILINE)) == 1, caught.value.message


def test_several_labels_are_asked_for_line_by_line_and_one_choice_is_enough() -> None:
    examples = [{"text": "It crashes.", "labels": ["bug"]}, {"text": "Hello.", "labels": []}]
    spec = parse_spec(changed(label={"multi": True, "examples": examples}), name="job.yaml")
    assert spec.prompt.template is not None
    assert "colon, and yes if it fits or no if it doesn't." in spec.prompt.template
    assert [each.assistant for each in spec.prompt.examples] == ["billing: no\nbug: yes", "billing: no\nbug: no"]
    assert parse_spec(changed(label={"multi": True, "choices": ["bug"], "examples": []}), name="job.yaml").label


def test_a_system_text_and_the_safe_prompt_go_with_labelling() -> None:
    spec = parse_spec(changed(prompt={"system": "You know tickets.", "safe_prompt": True}), name="job.yaml")
    assert (spec.prompt.system, spec.prompt.safe_prompt) == ("You know tickets.", True)
    assert "{{ body }}" in str(spec.prompt.template)
