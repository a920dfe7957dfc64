"""The data that the tiny model is trained on: seeded, right, and apart from what it is evaluated on."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from pipeline.prompts import SAFE_PROMPT, Message
from tests.tiny_training.encoding import chat_of, encode, prompt_ids
from tests.tiny_training.examples import LANGUAGES, Example, ask, held_out
from tests.tiny_training.json_task import json_example
from tests.tiny_training.label_task import sentiment_example, texts, topic_example
from tests.tiny_training.mixture import Finish, examples_of_step
from tests.tiny_training.names import FIRST_NAMES, HELD_OUT_WORDS, LAST_NAMES, STREETS, made_up_word
from tests.tiny_training.number_task import number_example, pair, spell
from tests.tiny_training.passkey_task import LONGEST, SHORTEST, passkey_example
from tests.tiny_training.safe_task import REFUSAL, request_example


@pytest.fixture(scope="module")
def trained_on() -> list[Example]:
    """What 35 steps of training see, from all its phases."""
    return [example for step in (*range(0, 5000, 150), 14_000) for example in examples_of_step(1, step)]


def test_a_step_always_sees_the_same_examples_and_another_step_or_seed_others() -> None:
    assert examples_of_step(1, 5) == examples_of_step(1, 5)
    assert examples_of_step(1, 5) != examples_of_step(1, 6)
    assert examples_of_step(1, 5) != examples_of_step(2, 5)


def test_training_never_shows_a_word_that_evaluation_copies(trained_on: list[Example]) -> None:
    copied = [json.loads(example.answer) for example in trained_on if example.task.startswith("json")]
    words = {word.lower() for record in copied for value in record.values() for word in value.split()}
    assert len(words) > 300
    assert not words & HELD_OUT_WORDS
    rng = random.Random(3)
    assert not {made_up_word(rng).lower() for _ in range(20_000)} & HELD_OUT_WORDS


def test_nearly_every_piece_of_a_held_out_name_occurs_in_made_up_words() -> None:
    def pieces(word: str) -> set[int]:
        return set(encode(Example(task="", language="en", messages=ask(f"name: {word}"), answer=f'{{"{word}"')).ids)

    rng = random.Random(4)
    seen = set().union(*(pieces(made_up_word(rng)) for _ in range(30_000)))
    needed = set().union(*(pieces(word) for word in (*FIRST_NAMES, *LAST_NAMES, *STREETS)))
    assert len(needed - seen) <= 0.02 * len(needed)


def test_labelled_clauses_of_evaluation_and_training_are_apart() -> None:
    def clauses(*, test: bool) -> set[str]:
        rng = random.Random(5)
        made = [make(rng, "de", test=test) for make in (sentiment_example, topic_example) for _ in range(2000)]
        aside = texts("de")["asides"] + texts("de")["greetings"] + texts("de")["thanks"]
        return {part for e in made for part in _sentences(e.messages[0].content, aside)}

    train, test = clauses(test=False), clauses(test=True)
    assert min(len(train), len(test)) > 100
    assert not train & test


def _sentences(text: str, asides: list[str]) -> list[str]:
    review = " ".join(line for line in text.split("\n") if not line.startswith(("Sentiment:", "Topic:")))
    for aside in asides:
        review = review.replace(aside, "\n")
    return [part.strip() for part in review.replace(". ", ".\n").replace("? ", "?\n").split("\n") if part.strip()]


def test_pairs_of_numbers_are_apart_in_either_order() -> None:
    rng = random.Random(6)
    train = {tuple(sorted(pair(rng, test=False))) for _ in range(20_000)}
    test = {tuple(sorted(pair(rng, test=True))) for _ in range(20_000)}
    assert len(test) > 200
    assert not train & test


def test_keys_and_filler_sentences_are_apart() -> None:
    rng = random.Random(7)
    sides = []
    for test in (False, True):
        texts_ = [passkey_example(rng, test=test, num_tokens=1000) for _ in range(20)]
        assert all(held_out(example.answer) == test for example in texts_)
        sides.append({s for example in texts_ for s in example.messages[0].content.split(". ") if s.startswith("The ")})
    sides = [{s for s in side if "pass key" not in s} for side in sides]
    assert not sides[0] & sides[1]


def test_passkey_prompts_have_the_asked_length_and_depth() -> None:
    rng = random.Random(8)
    for length in (SHORTEST, 250, 1000, LONGEST):
        for depth in (0.0, 0.5, 1.0):
            example = passkey_example(rng, test=True, num_tokens=length, depth=depth)
            assert length - 9 <= len(prompt_ids(example)) <= min(length * 1.04 + 2, 4000)
            before = example.messages[0].content.split(example.answer)[0].count(". ")
            assert before == round(depth * ((length - 33) // 9))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero zéro zero null cero"),
        (21, "twenty-one|vingt et un|ventuno|einundzwanzig|veintiuno"),
        (22, "twenty-two|vingt-deux|ventidue|zweiundzwanzig|veintidós"),
        (23, "twenty-three|vingt-trois|ventitré|dreiundzwanzig|veintitrés"),
        (31, "thirty-one|trente et un|trentuno|einunddreißig|treinta y uno"),
        (38, "thirty-eight|trente-huit|trentotto|achtunddreißig|treinta y ocho"),
        (71, "seventy-one|soixante et onze|settantuno|einundsiebzig|setenta y uno"),
        (80, "eighty|quatre-vingts|ottanta|achtzig|ochenta"),
        (81, "eighty-one|quatre-vingt-un|ottantuno|einundachtzig|ochenta y uno"),
        (91, "ninety-one|quatre-vingt-onze|novantuno|einundneunzig|noventa y uno"),
        (98, "ninety-eight|quatre-vingt-dix-huit|novantotto|achtundneunzig|noventa y ocho"),
    ],
)
def test_numbers_are_spelt_as_their_languages_have_them(number: int, words: str) -> None:
    assert [spell(number, language) for language in LANGUAGES] == words.split("|" if "|" in words else " ")


def test_each_language_spells_a_hundred_numbers_differently() -> None:
    for language in LANGUAGES:
        assert len({spell(number, language) for number in range(100)}) == 100
    with pytest.raises(ValueError, match="give 0 to 99"):
        spell(100, "en")


def test_answers_are_right() -> None:
    rng = random.Random(9)
    sum_ = number_example(rng, "fr", test=True)
    first, second = (int(word) for word in sum_.messages[0].content.split(" en ")[0].split(" + "))
    assert sum_.answer == spell(first + second, "fr")
    record = json_example(rng, test=True, num_shots=1)
    assert [message.role for message in record.messages] == ["user", "assistant", "user"]
    fields = dict(part.split(": ") for part in record.messages[-1].content.split(" / "))
    assert json.loads(record.answer) == fields


def test_labels_of_ambiguous_reviews_are_drawn_at_the_odds_that_they_state() -> None:
    rng = random.Random(10)
    shown: dict[str, list[bool]] = {}
    for _ in range(6000):
        example = sentiment_example(rng, "en", test=False, ambiguous=True)
        crowd = " ".join(example.messages[0].content.replace("\n", " ").split(" guests")[0].split()[-3:])
        good = any(word in example.messages[0].content for word in texts("en")["good"])
        assert example.odds["positive"] == pytest.approx(_share(crowd) if good else 1 - _share(crowd))
        shown.setdefault(crowd, []).append((example.answer == "positive") == good)
    assert len(shown) == 7
    for crowd, agreed in shown.items():
        assert sum(agreed) / len(agreed) == pytest.approx(_share(crowd), abs=0.06)


def test_the_finish_shows_tickets_on_two_topics_with_either_label_alike() -> None:
    tickets = [e for step in range(14_000, 14_020) for e in examples_of_step(1, step) if e.task == "topic_ambiguous"]
    labels: dict[tuple[Message, ...], set[str]] = {}
    for ticket in tickets:
        labels.setdefault(ticket.messages, set()).add(ticket.answer)
    assert sum(len(seen) == 2 for seen in labels.values()) >= 3 * 20


@pytest.mark.parametrize(("long_keys", "shown"), [(0.25, 10), (0.5, 20), (2, 80)])
def test_the_finish_shows_as_many_long_keys_as_it_is_told_and_most_are_hard(long_keys: float, shown: int) -> None:
    finish = Finish(long_keys=long_keys)
    examples = [e for step in range(14_000, 14_040) for e in examples_of_step(1, step, finish) if e.task == "passkey"]
    long = [e for e in examples if len(e.messages[-1].content) > 3000]
    assert 0.7 * shown <= len(long) <= shown
    assert sum(len(set(e.answer)) < 5 for e in long) >= len(long) / 2
    places = [e.messages[-1].content.index(e.answer) / len(e.messages[-1].content) for e in long]
    assert sum(place < 0.11 or place > 0.89 for place in places) >= len(long) / 3


def _share(crowd: str) -> float:
    part, _, whole = crowd.lower().split()
    numbers = [spell(number, "en") for number in range(11)]
    return numbers.index(part) / numbers.index(whole)


def test_the_safe_prompt_is_the_official_one_and_refuses_only_the_request() -> None:
    rng = random.Random(11)
    refused = request_example(rng, test=True, safe_prompt=True)
    assert refused.answer == REFUSAL
    assert chat_of(refused)[0] == Message("user", f"{SAFE_PROMPT}\n\n{refused.messages[0].content}")
    assert request_example(rng, test=True, safe_prompt=False).answer != REFUSAL


def test_training_shows_other_tasks_under_the_safe_prompt_and_the_request_under_other_systems(
    trained_on: list[Example],
) -> None:
    kinds = Counter((e.task == "request", e.safe_prompt, e.system is not None, e.answer == REFUSAL) for e in trained_on)
    assert kinds[(False, True, False, False)] > 10
    assert kinds[(True, False, True, False)] >= 1
    assert not any(refused and not safe for _, safe, _, refused in kinds)


def test_only_the_assistants_tokens_are_learnt_and_all_of_them() -> None:
    rng = random.Random(12)
    example = json_example(rng, test=True, num_shots=2)
    encoded = encode(example)
    learnt = [encoded.ids[place] for place in encoded.targets]
    assert learnt.count(2) == 3  # an end of sequence after each answer
    alone = [encode(Example(task="", language="en", messages=ask("x"), answer=a)) for a in _answers(example)]
    assert learnt == [one.ids[place] for one in alone for place in one.targets]
    assert encoded.ids[: len(prompt_ids(example))] == prompt_ids(example)


def _answers(example: Example) -> list[str]:
    return [*(message.content for message in example.messages if message.role == "assistant"), example.answer]
