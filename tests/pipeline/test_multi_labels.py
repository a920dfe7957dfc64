"""Any number of labels a row: probabilities that don't depend on each other, the threshold, and unsure rows."""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.chat_encoder import choose_encoder
from pipeline.choice_tokens import yes_no_tree
from pipeline.errors import SpecError
from pipeline.labels import CONFIDENCE, PROBABILITIES
from pipeline.model import fetch_model
from pipeline.multi_labels import LABELS, MultiLabelRule
from pipeline.settings import ModelSettings

CHOICES = ("billing", "bug", "bug report")
logs_of_all = st.lists(st.floats(-60, 0), min_size=6, max_size=6)


@given(logs_of_all, st.floats(0.2, 5), st.floats(0.05, 0.95), st.floats(0, 1))
def test_labels_are_those_above_the_threshold_or_the_default_when_the_least_sure_decision_is_unsure(
    logs: list[float], temperature: float, threshold: float, abstain_below: float
) -> None:
    values = MultiLabelRule(CHOICES, temperature, threshold, abstain_below, "unsure").columns(logs)
    said = values[PROBABILITIES]
    for place, choice in enumerate(CHOICES):
        yes, no = logs[2 * place : 2 * place + 2]
        assert said[choice] == pytest.approx(1 / (1 + math.exp((no - yes) / temperature)))
    fitting = [choice for choice in CHOICES if said[choice] >= threshold]
    assert values[CONFIDENCE] == min(p if p >= threshold else 1 - p for p in said.values())
    assert values[LABELS] == (fitting if values[CONFIDENCE] >= abstain_below else ["unsure"])


def test_a_label_depends_on_no_other() -> None:
    rule = MultiLabelRule(CHOICES)
    alone = rule.columns([-1.0, -2.0, -9.0, -0.1, -9.0, -0.1])
    beside = rule.columns([-1.0, -2.0, -0.1, -9.0, -0.1, -9.0])
    assert alone[PROBABILITIES]["billing"] == beside[PROBABILITIES]["billing"]
    assert (alone[LABELS], beside[LABELS]) == (["billing"], list(CHOICES))


def test_an_unsure_row_has_null_or_the_default_and_keeps_its_text_and_probabilities() -> None:
    unsure = [math.log(0.6), math.log(0.4), *[-9.0, -0.1] * 2]
    rule = MultiLabelRule(CHOICES, abstain_below=0.7)
    assert rule.columns(unsure)[LABELS] is None
    assert rule.columns(unsure)[PROBABILITIES]["billing"] == pytest.approx(0.6)
    assert json.loads(rule.text(unsure)) == ["billing"]


def test_values_fit_the_fields_and_rows_without_a_label_differ_from_failed_ones() -> None:
    rule = MultiLabelRule(CHOICES)
    values = [rule.columns([-9.0, -0.1] * 3), dict.fromkeys((LABELS, CONFIDENCE, PROBABILITIES))]
    for field in rule.fields():
        column = pa.array([value[field.name] for value in values], field.type)
        assert column.null_count == 1
    assert values[0][LABELS] == []


def test_a_label_costs_one_question_with_two_tokens() -> None:
    encoder = choose_encoder(fetch_model(ModelSettings(source="tiny")).path, marker_text="escape")
    tree = yes_no_tree(encoder, CHOICES)
    assert len(tree.choices) == 6
    assert [len(question.tokens) for question in tree.questions] == [2, 2, 2]
    with pytest.raises(SpecError, match="same tokens"):
        yes_no_tree(encoder, ("bug", "bug"))
