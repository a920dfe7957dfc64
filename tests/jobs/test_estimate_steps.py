"""What a synthesis's later steps add to its run, by hand."""

from __future__ import annotations

from cluster.roofline import TokenTotal, Work
from jobs.estimate_steps import later_steps, whole_work
from jobs.synthesis_judge import judge_prompt
from pipeline.synthesis_settings import ConversationSettings, JudgeSettings, SynthesisSettings

PROMPTS, ANSWERS = TokenTotal(1000, 900, 1100), TokenTotal(500, 250, 1000)
TALK = ConversationSettings(turns=3, user="x" * 40)  # 10 tokens a question
JUDGE = JudgeSettings(instructions="Is it good?", scores={"1": "no", "2": "yes"}, keep_from=2)


def test_a_talks_prompts_grow_by_each_turn() -> None:
    [turns] = later_steps(SynthesisSettings(conversation=TALK), samples=10, prompts=PROMPTS, answers=ANSWERS)
    # Turn 2: asked with 1500 (and 100 of its own), answered with 1500 + 500. Turn 3: the talk is 2500 by then.
    assert turns.work.input_tokens.total == (1600 + 2000) + (2600 + 3000)
    assert turns.work.output_tokens == TokenTotal(4 * 500, 4 * 250, 4 * 1000)
    assert turns.work.num_sequences == 40
    assert turns.work.input_tokens.low == (1250 + 1400) + (1750 + 1900)
    assert turns.work.input_tokens.low < turns.work.input_tokens.total < turns.work.input_tokens.high


def test_a_judge_reads_each_record_and_says_a_score() -> None:
    [judge] = later_steps(SynthesisSettings(judge=JUDGE), samples=10, prompts=PROMPTS, answers=ANSWERS)
    assert judge.work.input_tokens.total == 500 + round(10 * len(judge_prompt(JUDGE)) / 4)
    assert judge.work.output_tokens.total == 10
    both = later_steps(SynthesisSettings(judge=JUDGE, conversation=TALK), samples=10, prompts=PROMPTS, answers=ANSWERS)
    assert both[1].work.input_tokens.total - judge.work.input_tokens.total == 3500 - 500, "it reads the whole talk"


def test_what_prompts_insert_is_counted() -> None:
    settings = JUDGE.model_copy(update={"instructions": "Of {{ page }}: good?"})
    plain, long = (
        later_steps(SynthesisSettings(judge=settings), samples=10, prompts=PROMPTS, answers=ANSWERS, column_chars=chars)
        for chars in ({}, {"page": 4000.0, "other": 9.0})
    )
    assert long[0].work.input_tokens.total - plain[0].work.input_tokens.total == 10 * 1000


def test_all_of_it_is_added_up_and_a_plain_synthesis_adds_nothing() -> None:
    assert later_steps(SynthesisSettings(), samples=10, prompts=PROMPTS, answers=ANSWERS) == []
    first = Work(10, PROMPTS, ANSWERS)
    assert whole_work(first, []) == first
    steps = later_steps(SynthesisSettings(judge=JUDGE), samples=10, prompts=PROMPTS, answers=ANSWERS)
    assert whole_work(first, steps).output_tokens == TokenTotal(510, 260, 1010)
