"""Near-duplicates planted at known rates are found, distinct texts are kept, whatever the library's sketches say."""

from __future__ import annotations

import random

import pytest

from pipeline.diversity import DiversitySample
from pipeline.near_duplicates import DuplicateFinder, jaccard, shingles

LETTERS = "etaoinshrdlu"


def vocabulary(draw: random.Random) -> list[str]:
    return ["".join(draw.choices(LETTERS, k=draw.randint(3, 9))) for _ in range(3000)]


def changed(text: str, words: list[str], count: int, draw: random.Random) -> str:
    parts = text.split()
    for place in draw.sample(range(len(parts)), count):
        parts[place] = draw.choice(words)
    return " ".join(parts)


def test_planted_near_duplicates_are_found_and_distinct_texts_are_not_lost() -> None:
    draw = random.Random(7)
    words = vocabulary(draw)
    distinct = [" ".join(draw.choices(words, k=30)) for _ in range(400)]
    finder = DuplicateFinder(exact=True, near=0.8)
    lost = sum(finder.check(f"d{number}", text) is not None for number, text in enumerate(distinct))
    assert lost <= 0.01 * len(distinct)
    planted, found, wrong = 0, 0, 0
    for number, text in enumerate(distinct):
        copy = changed(text, words, 1 + number % 6, draw)
        similarity = jaccard(shingles(text), shingles(copy))
        answer = finder.check(f"c{number}", copy)
        if similarity >= 0.8:
            planted += 1
            found += answer is not None and answer[:2] == ("near_duplicate", f"d{number}")
        else:
            wrong += answer is not None
    assert planted >= 80
    assert found >= 0.95 * planted
    assert wrong == 0


@pytest.mark.parametrize(("near", "kept"), [(0.5, False), (0.95, True), (None, True)])
def test_how_alike_is_too_alike_is_a_setting(near: float | None, kept: bool) -> None:
    finder = DuplicateFinder(exact=True, near=near)
    text = "the quick brown fox jumps over the lazy dog and runs far away into the dark green wood"
    assert finder.check("a", text) is None
    assert (finder.check("b", text.replace("lazy", "sleepy")) is None) is kept


def test_equal_but_for_case_and_spaces_is_equal() -> None:
    finder = DuplicateFinder(exact=True, near=None)
    assert finder.check("a", "Hello  World") is None
    assert finder.check("b", "hello world\n") == ("exact_duplicate", "a", 1.0)
    assert finder.check("c", "hello worlds") is None
    assert DuplicateFinder(exact=False, near=None).check("a", "x") is None


def test_short_and_empty_texts_have_a_likeness_too() -> None:
    finder = DuplicateFinder(exact=False, near=0.8)
    assert [finder.check(str(number), text) for number, text in enumerate(["", "ab", "abc"])] == [None] * 3
    assert finder.check("again", "AB") == ("near_duplicate", "1", 1.0)


def test_diversity_tells_monotony_from_variety_and_depends_on_no_order() -> None:
    draw = random.Random(3)
    words = vocabulary(draw)
    varied = {str(number): " ".join(draw.choices(words, k=20)) for number in range(300)}
    dull = {str(number): f"please help me with my invoice number {number}" for number in range(300)}
    figures = []
    for texts in (varied, dull):
        samples = [DiversitySample(), DiversitySample()]
        for key in texts:
            samples[0].add(key, texts[key])
        for key in reversed(texts):
            samples[1].add(key, texts[key])
        assert samples[0].figures() == samples[1].figures()
        figures.append(samples[0].figures())
    assert figures[0]["distinct_2"] > 0.95 > 0.3 > figures[1]["distinct_2"]
    assert figures[0]["self_similarity"] < 0.1 < 0.7 < figures[1]["self_similarity"]


def test_one_text_alone_is_like_no_other() -> None:
    sample = DiversitySample()
    sample.add("a", "word")
    assert sample.figures() == {
        "sampled_records": 1,
        "distinct_1": 1.0,
        "distinct_2": None,
        "distinct_3": None,
        "self_similarity": None,
    }
