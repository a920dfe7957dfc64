"""Per-row sampling is strict, and seeds depend on nothing but the row's identity."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import RowError
from pipeline.sampling import row_sampling, row_seed, sampling_from_json, sampling_to_json
from pipeline.settings import SamplingSettings

BASE = SamplingSettings(temperature=0.7, max_tokens=64, seed=5)


def test_null_override_costs_nothing_and_returns_the_base_itself() -> None:
    assert row_sampling(BASE, None) is BASE


@pytest.mark.parametrize(
    "override",
    [
        {"temperature": 0},
        {"max_tokens": 8, "stop": ["\n"]},
        {"seed": None},
        {"n": 4, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "logprob": True, "ignore_eos": True, "min_tokens": 2},
        {"presence_penalty": -1.5, "frequency_penalty": 2, "repetition_penalty": 1.1},
        {},
    ],
)
def test_an_override_changes_its_keys_and_no_others(override: dict[str, object]) -> None:
    settings = row_sampling(BASE, json.dumps(override))
    assert settings.model_dump() == BASE.model_dump() | override


def test_every_setting_but_the_jobs_own_can_be_overridden() -> None:
    for name, value in BASE.model_dump().items():
        text = json.dumps({name: value})
        if name in ("column", "fit", "dedupe"):
            with pytest.raises(RowError, match="belongs to the job"):
                row_sampling(BASE, text)
        else:
            assert row_sampling(BASE, text) == BASE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("null", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("3", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ('{"temperature": 0, "temperature": 1}', "given twice"),
        ('{"temprature": 0}', "`temprature` is not a sampling setting"),
        ('{"temperature": -1}', "`temperature` is -1"),
        ('{"temperature": "0"}', "`temperature` is '0'"),
        ('{"temperature": NaN}', "`temperature` is nan"),
        ('{"temperature": Infinity}', "`temperature` is inf"),
        ('{"temperature": null}', "`temperature` is None"),
        ('{"max_tokens": 0}', "`max_tokens` is 0"),
        ('{"max_tokens": 1.5}', "`max_tokens` is 1.5"),
        ('{"max_tokens": true}', "`max_tokens` is True"),
        ('{"n": 1025}', "`n` is 1025"),
        ('{"top_p": 0}', "`top_p` is 0"),
        ('{"stop": "x"}', "`stop` is 'x'"),
        ('{"stop": [""]}', "`stop.0` is ''"),
        ('{"seed": -1}', "`seed` is -1"),
        ('{"fit": true}', "`fit` belongs to the job"),
        ('{"column": "x"}', "`column` belongs to the job"),
        ('{"min_tokens": 65}', "min_tokens 65 is more than max_tokens 64"),
        ('{"n": 2, "temperature": 0}', "set `n` to 1"),
    ],
)
def test_a_bad_override_is_a_failed_row_that_names_key_and_rule(text: str, words: str) -> None:
    with pytest.raises(RowError) as caught:
        row_sampling(BASE, text)
    assert caught.value.kind == "bad_sampling"
    assert words in caught.value.message
    assert len(caught.value.message) < 500


def test_a_sampling_column_of_another_type_is_a_failed_row() -> None:
    with pytest.raises(RowError, match="must hold JSON text"):
        row_sampling(BASE, {"temperature": 0})  # type: ignore[arg-type]


def test_sampling_survives_the_trip_through_json() -> None:
    settings = row_sampling(BASE, '{"stop": ["é\\u2028", "\\""], "temperature": 0.1, "seed": 9223372036854775807}')
    assert sampling_from_json(sampling_to_json(settings)) == settings


def test_row_seed_is_pinned_so_that_a_new_release_reproduces_old_results() -> None:
    assert row_seed(1, "s3://bucket/a.parquet", 0) == 445195235748204475
    assert row_seed(0, "", 0) == 240208819366769035


def test_row_seeds_are_in_range_and_differ_by_job_file_and_row() -> None:
    seeds = {row_seed(job, file, row) for job in range(4) for file in ("a", "b", "a0") for row in range(1000)}
    assert len(seeds) == 4 * 3 * 1000
    assert all(0 <= seed < 2**62 for seed in seeds)
