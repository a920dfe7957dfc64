"""Which answers of a synthesis are records, and why the others aren't. Reads nothing.

Invariant: an answer's verdict depends on those before it only through doubles, of which the first stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.prepare import PreparedJob
from jobs.synthesis_answers import Answer
from jobs.synthesis_judge import Judged
from pipeline.json_schemas import schema_text, violation
from pipeline.languages import language_of
from pipeline.near_duplicates import DuplicateFinder
from pipeline.synthesis_settings import FilterSettings, SynthesisSettings


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a sample is dropped."""

    reason: str
    detail: str | None = None
    like: str | None = None
    """The earlier record that it is too much like: file:row:sample."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """An answer with what is thought of it."""

    row: int
    """In its part."""
    answer: Answer
    verdict: Verdict | None
    """None: a record."""
    score: int | None = None
    """The judge's, if it came so far."""


class Sieve:
    """Gives verdicts on answers, one after the other in order."""

    def __init__(self, job: PreparedJob) -> None:
        settings = job.spec.synthesize or SynthesisSettings()
        schema = job.spec.sampling.json_schema
        self._schema = None if schema is None else schema_text(schema)
        self._filters = settings.filters
        self._keep_from = settings.judge.keep_from if settings.judge is not None else None
        self._finder = DuplicateFinder(exact=settings.duplicates.exact, near=settings.duplicates.near)

    def weigh(self, row: int, answer: Answer, judged: Judged | None = None) -> Weighed:
        """All there is to say of an answer; `judged` is the judge's word, once there is one."""
        verdict = self._verdict(answer)
        if verdict is not None or judged is None:
            return Weighed(row, answer, verdict)
        return Weighed(row, answer, self._by_score(judged), judged.score)

    def _by_score(self, judged: Judged) -> Verdict | None:
        if judged.score is None:
            return Verdict("not_judged", judged.problem)
        if self._keep_from is not None and judged.score < self._keep_from:
            return Verdict("judged_low", f"score {judged.score}, less than {self._keep_from}")
        return None

    def _verdict(self, answer: Answer) -> Verdict | None:
        if answer.status != "ok" or answer.text is None:
            return Verdict(answer.status, answer.problem)
        if self._schema is not None and (broken := violation(answer.text, self._schema)) is not None:
            return Verdict("invalid", broken)
        text = said_text(answer)
        if (unwanted := unwanted_because(text, self._filters)) is not None:
            return unwanted
        found = self._finder.check(answer.name, text)
        return None if found is None else Verdict(found[0], f"Jaccard {found[2]:.3f}", found[1])


def said_text(answer: Answer) -> str:
    """What filters, doubles and diversity look at: what was generated, and not the prompt that a talk begins with."""
    return record_text(answer.text or "") if answer.words is None else answer.words


def record_text(record: str) -> str:
    """What a record says: of JSON all its strings, one a line; keys are the same in all records."""
    try:
        value = json.loads(record)
    except ValueError:
        return record
    return "\n".join(_strings(value)) if isinstance(value, dict | list) else record


def unwanted_because(text: str, filters: FilterSettings) -> Verdict | None:
    """Which filter a text doesn't pass."""
    import re2

    if len(text) < filters.min_chars:
        return Verdict("too_short", f"{len(text)} characters, fewer than {filters.min_chars}")
    if filters.max_chars is not None and len(text) > filters.max_chars:
        return Verdict("too_long", f"{len(text)} characters, more than {filters.max_chars}")
    if filters.matches is not None and re2.search(filters.matches, text) is None:
        return Verdict("no_match", f"{filters.matches!r} isn't found")
    if filters.rejects is not None and (found := re2.search(filters.rejects, text)) is not None:
        return Verdict("rejected", f"{found.group()[:100]!r} is found")
    if filters.languages is not None:
        code, confidence = language_of(text)
        if code not in filters.languages:
            return Verdict("language", f"{code} ({confidence:.2f}), not {' or '.join(filters.languages)}")
    return None


def _strings(value: Any) -> Iterator[str]:
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            yield each
        children = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        stack += reversed([*children])
