"""What a record must be like to be kept: languages here; the rest is seen in whole syntheses."""

from __future__ import annotations

import pytest

from jobs.synthesis_verdicts import unwanted_because
from pipeline.languages import known_languages
from pipeline.synthesis_settings import FilterSettings
from tests.tiny_training.examples import LANGUAGES
from tests.tiny_training.label_task import texts


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_record_in_another_language_is_dropped_and_says_which(language: str) -> None:
    words = texts(language)
    sentences = " ".join(frame.format(product=words["products"][0]) for frame in words["topics"]["delivery"])
    others = [each for each in LANGUAGES if each != language]
    assert unwanted_because(sentences, FilterSettings(languages=[language])) is None
    unwanted = unwanted_because(sentences, FilterSettings(languages=others))
    assert unwanted is not None
    assert (unwanted.reason, unwanted.detail) == ("language", f"{language} (1.00), not {' or '.join(others)}")


@pytest.mark.parametrize(
    ("filters", "text", "reason"),
    [
        ({"min_chars": 5}, "four", "too_short"),
        ({"min_chars": 5}, "fives", None),
        ({"max_chars": 5}, "sixsix", "too_long"),
        ({"max_chars": 5}, "fives", None),
        ({"matches": "^[A-Z]"}, "small", "no_match"),
        ({"matches": "^[A-Z]"}, "Large", None),
        ({"rejects": "as an AI"}, "Well, as an AI I", "rejected"),
        ({"rejects": "as an AI"}, "Well, I", None),
    ],
)
def test_a_record_that_a_filter_does_not_let_pass_is_dropped_by_its_name(
    filters: dict[str, object], text: str, reason: str | None
) -> None:
    unwanted = unwanted_because(text, FilterSettings.model_validate(filters))
    assert (unwanted and unwanted.reason) == reason


def test_most_languages_of_europe_can_be_found() -> None:
    assert known_languages() > {"en", "fr", "de", "es", "it", "nl", "pl", "pt", "sv", "cs", "uk", "el"}
