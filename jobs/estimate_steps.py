"""What the steps after a synthesis's run add to it: turns of its conversations, and its judge. Pure.

Their prompts hold answers that aren't there yet, so that they are as unsure as the answers' expected length. Rounds for
broken records aren't counted: how many break is known only once some have been answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.roofline import TokenTotal, Work
from jobs.synthesis_judge import judge_prompt
from pipeline.jinja_guard import template_columns
from pipeline.synthesis_settings import TALK, SynthesisSettings

CHARS_PER_TOKEN = 4
"""Of the prompts' own words, which are a small part: of English."""


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of requests, over all samples."""

    name: str
    work: Work

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"step": self.name, "requests": self.work.num_sequences, **_tokens(self.work)}


def columns_of_steps(synthesis: SynthesisSettings) -> tuple[frozenset[str], frozenset[str]]:
    """Columns that the prompts for the user's messages insert, and those that the judge's inserts."""
    talk = template_columns(synthesis.conversation.user) if synthesis.conversation is not None else set[str]()
    judged = template_columns(synthesis.judge.instructions) if synthesis.judge is not None else set[str]()
    return frozenset(talk - {TALK}), frozenset(judged - {"record"})


def later_steps(
    synthesis: SynthesisSettings,
    *,
    samples: int,
    prompts: TokenTotal,
    answers: TokenTotal,
    column_chars: Mapping[str, float] | None = None,
) -> list[Step]:
    """The steps after the run.

    Args:
        synthesis: what is to be done.
        samples: rows times `sampling.n`; each is taken for a good one.
        prompts: tokens of the first prompts, summed over samples.
        answers: expected tokens of their first answers, likewise.
        column_chars: mean length of what the later prompts insert, see `columns_of_steps`.
    """
    inserted = [sum((column_chars or {}).get(name, 0) for name in names) for names in columns_of_steps(synthesis)]
    steps: list[Step] = []
    talk = _each(prompts, answers, lambda prompt, answer: prompt + answer)
    if synthesis.conversation is not None:
        asking = round(samples * (len(synthesis.conversation.user) + inserted[0]) / CHARS_PER_TOKEN)
        inputs = outputs = TokenTotal(0, 0, 0)
        for _ in range(2, 1 + synthesis.conversation.turns):
            # The user's message is asked for with the talk so far, and the answer with that and the message.
            asked = _each(talk, answers, lambda so_far, answer: 2 * so_far + answer + asking)
            inputs = _each(inputs, asked, int.__add__)
            outputs = _each(outputs, answers, lambda so_far, answer: so_far + 2 * answer)
            talk = _each(talk, answers, lambda so_far, answer: so_far + 2 * answer)
        requests = 2 * (synthesis.conversation.turns - 1) * samples
        steps.append(Step("turns", Work(requests, inputs, outputs)))
    if synthesis.judge is not None:
        words = round(samples * (len(judge_prompt(synthesis.judge)) + inserted[1]) / CHARS_PER_TOKEN)
        record = answers if synthesis.conversation is None else talk
        scores = TokenTotal(samples, samples, samples)
        steps.append(Step("judge", Work(samples, _each(record, record, lambda tokens, _: tokens + words), scores)))
    return steps


def whole_work(first: Work, steps: list[Step]) -> Work:
    """The run's work and that of all steps."""
    works = [first, *(step.work for step in steps)]
    inputs = [work.input_tokens for work in works]
    outputs = [work.output_tokens for work in works]
    return Work(sum(work.num_sequences for work in works), _sum(inputs), _sum(outputs))


def _each(a: TokenTotal, b: TokenTotal, combine: Callable[[int, int], int]) -> TokenTotal:
    """Least with least, most with most."""
    return TokenTotal(combine(a.total, b.total), combine(a.low, b.low), combine(a.high, b.high))


def _sum(totals: list[TokenTotal]) -> TokenTotal:
    columns = ("total", "low", "high")
    return TokenTotal(*(sum(getattr(total, column) for total in totals) for column in columns))


def _tokens(work: Work) -> dict[str, Any]:
    return {"input_tokens": asdict(work.input_tokens), "output_tokens": asdict(work.output_tokens)}
