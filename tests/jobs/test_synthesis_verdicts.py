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


def test_most_languages_of_europe_can_be_found() -> None:
    assert known_languages() > {"en", "fr", "de", "es", "it", "nl", "pl", "pt", "sv", "cs", "uk", "el"}
