"""A row's label columns: a proper distribution, its mode, and the threshold."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.labels import CONFIDENCE, LABEL, PROBABILITIES, LabelRule

CHOICES = ("billing", "bug", "bug report")
logs_of_all = st.lists(st.floats(-60, 0), min_size=3, max_size=3)


@given(logs_of_all, st.floats(0.2, 5), st.floats(0, 1))
def test_probabilities_are_a_distribution_and_the_label_is_its_mode_or_the_default(
    logs: list[float], temperature: float, threshold: float
) -> None:
    values = LabelRule(CHOICES, temperature, threshold, "unsure").columns(logs)
    assert list(values[PROBABILITIES]) == list(CHOICES)
    assert sum(values[PROBABILITIES].values()) == pytest.approx(1)
    assert values[CONFIDENCE] == max(values[PROBABILITIES].values())
    best = max(CHOICES, key=lambda choice: values[PROBABILITIES][choice])
    assert values[LABEL] == (best if values[CONFIDENCE] >= threshold else "unsure")


def test_a_label_below_the_threshold_is_null_and_its_probabilities_stay() -> None:
    rule = LabelRule(CHOICES, abstain_below=0.6)
    sure, unsure = rule.columns([math.log(0.08), math.log(0.02), math.log(0.01)]), rule.columns([-1.0, -1.0, -9.0])
    assert (sure[LABEL], sure[CONFIDENCE]) == ("billing", pytest.approx(8 / 11))
    assert unsure[LABEL] is None
    assert unsure[PROBABILITIES]["bug"] == pytest.approx(0.5, abs=1e-3)


def test_a_temperature_above_one_lowers_confidence_and_keeps_the_label() -> None:
    logs = [-0.5, -2.0, -4.0]
    cold, warm = LabelRule(CHOICES).columns(logs), LabelRule(CHOICES, temperature=3.0).columns(logs)
    assert warm[CONFIDENCE] < cold[CONFIDENCE]
    assert warm[LABEL] == cold[LABEL] == "billing"


def test_values_fit_the_fields_and_failed_rows_are_null() -> None:
    rule = LabelRule(CHOICES)
    values = [rule.columns([-1.0, -2.0, -3.0]), dict.fromkeys((LABEL, CONFIDENCE, PROBABILITIES))]
    for field in rule.fields():
        column = pa.array([value[field.name] for value in values], pa.string() if field.name == LABEL else field.type)
        assert column.null_count == 1
