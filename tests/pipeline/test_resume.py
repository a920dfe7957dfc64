from __future__ import annotations

import pytest

from pipeline.errors import SpecError
from pipeline.resume import Change, Decision, Found, changed_fields, decide, fingerprint_digest, refuse_foreign_parts

FIELDS = {"prompt.template": '"{{ a }}"', "sampling.seed": "1"}
NOTHING = Found(None, ())
BEGUN = Found(FIELDS, ())
PARTLY = Found(FIELDS, ("part-00000-000000000000.parquet",))


@pytest.mark.parametrize("resume", ["if_possible", "never"])
def test_empty_output_starts_afresh(resume: str) -> None:
    assert decide(NOTHING, FIELDS, resume=resume, output="out") is Decision.FRESH


@pytest.mark.parametrize("resume", ["if_possible", "always"])
@pytest.mark.parametrize("found", [BEGUN, PARTLY])
def test_same_fingerprint_resumes(found: Found, resume: str) -> None:
    assert decide(found, dict(reversed(FIELDS.items())), resume=resume, output="out") is Decision.RESUME


def test_always_is_refused_where_there_is_nothing() -> None:
    with pytest.raises(SpecError, match=r"always.*out holds no run"):
        decide(NOTHING, FIELDS, resume="always", output="out")


@pytest.mark.parametrize("found", [BEGUN, PARTLY])
def test_never_is_refused_where_there_is_a_run(found: Found) -> None:
    with pytest.raises(SpecError, match=r"never.*out holds a run"):
        decide(found, FIELDS, resume="never", output="out")


@pytest.mark.parametrize("resume", ["if_possible", "always"])
def test_different_fingerprint_is_refused_naming_every_changed_field(resume: str) -> None:
    new = {"prompt.template": '"{{ b }}"', "model.revision": '"abc"'}
    with pytest.raises(SpecError) as caught:
        decide(PARTLY, new, resume=resume, output="out")
    message = str(caught.value)
    assert 'prompt.template: "{{ a }}" -> "{{ b }}"' in message
    assert 'model.revision: (none) -> "abc"' in message
    assert "sampling.seed: 1 -> (none)" in message


def test_a_different_job_that_committed_nothing_is_replaced() -> None:
    assert decide(BEGUN, {"sampling.seed": "2"}, resume="if_possible", output="out") is Decision.REPLACE
    with pytest.raises(SpecError, match=r"sampling\.seed: 1 -> 2"):
        decide(BEGUN, {"sampling.seed": "2"}, resume="always", output="out")


@pytest.mark.parametrize("resume", ["if_possible", "always", "never"])
def test_data_without_a_recorded_run_is_refused(resume: str) -> None:
    with pytest.raises(SpecError, match="no run is recorded"):
        decide(Found(None, ["theirs.parquet"]), FIELDS, resume=resume, output="out")


def test_parts_outside_the_plan_are_refused_by_name() -> None:
    refuse_foreign_parts({"a"}, {"a", "b"}, output="out")
    with pytest.raises(SpecError, match=r"1 files.*: c;"):
        refuse_foreign_parts({"a", "c"}, {"a", "b"}, output="out")


def test_changes_are_named_with_both_values_whatever_the_order() -> None:
    assert changed_fields({"x": "1", "y": "2"}, {"y": "2", "x": "1"}) == []
    assert changed_fields({"x": "1", "y": "2"}, {"y": "3", "z": "4"}) == [
        Change("x", "1", None),
        Change("y", "2", "3"),
        Change("z", None, "4"),
    ]


def test_null_differs_from_absent() -> None:
    assert changed_fields({"x": "null"}, {}) == [Change("x", "null", None)]


def test_long_values_are_cut_in_the_message() -> None:
    assert len(str(Change("x", '"' + "a" * 10_000, None))) < 200


def test_digest_depends_on_every_field_and_not_on_order() -> None:
    assert fingerprint_digest(FIELDS) == fingerprint_digest(dict(reversed(FIELDS.items())))
    assert fingerprint_digest(FIELDS) != fingerprint_digest({**FIELDS, "sampling.seed": "2"})
