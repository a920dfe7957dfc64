"""The records of a synthesis: what was answered, less what is broken, unwanted or there already; nothing is lost.

One pass over committed parts in the order of the plan, and nothing else decides: done again it gives the same files.
Guarantees:
- every sample is once in `records/` or once in `dropped/`, there with the reason.
- a record follows the job's JSON schema, if it has one.
- of records that are alike the first stays, by input file, row and sample.
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.prepare import PreparedJob
from jobs.synthesis_answers import Answer, Key, read_answers
from pipeline.diversity import DiversitySample
from pipeline.json_schemas import schema_text, violation
from pipeline.near_duplicates import DuplicateFinder
from pipeline.record_fields import DROPPED_FIELDS, RECORD_FIELDS
from pipeline.rows import result_fields
from pipeline.storage import Store
from pipeline.synthesis_settings import FilterSettings, SynthesisSettings

RECORDS, DROPPED = "records", "dropped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a sample is dropped."""

    reason: str
    detail: str | None = None
    like: str | None = None
    """The earlier record that it is too much like: file:row:sample."""


@dataclass(slots=True)
class _Tally:
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sample: DiversitySample = field(default_factory=DiversitySample)
    drawn: dict[str, Counter[str | int]] = field(default_factory=lambda: defaultdict(Counter))


def write_records(job: PreparedJob, store: Store, later: Mapping[Key, Answer]) -> dict[str, Any]:
    """Write both folders anew, and return what is in them and how diverse it is."""
    judge, tally = _Judge(job), _Tally()
    before = [(folder, name) for folder in (RECORDS, DROPPED) for name in store.list(folder)]
    written: set[tuple[str, str]] = set()
    for shard, part, answers in read_answers(store, later):
        verdicts = [(row, answer, judge.verdict(answer)) for row, answer in answers]
        _count(tally, part, verdicts, job)
        for folder in (RECORDS, DROPPED):
            chosen = [each for each in verdicts if (each[2] is None) == (folder == RECORDS)]
            if chosen:
                store.put(f"{folder}/{shard.part_name}", _encoded(_table(part, chosen, folder)))
                written.add((folder, shard.part_name))
    for folder, name in before:
        if (folder, name) not in written:
            store.delete(f"{folder}/{name}")
    return _report(job, tally)


def record_text(record: str) -> str:
    """What a record says: of JSON all its strings, one a line; keys are the same in all records."""
    try:
        value = json.loads(record)
    except ValueError:
        return record
    return "\n".join(_strings(value)) if isinstance(value, dict | list) else record


class _Judge:
    """Gives verdicts on answers, one after the other in order."""

    def __init__(self, job: PreparedJob) -> None:
        settings = job.spec.synthesize or SynthesisSettings()
        schema = job.spec.sampling.json_schema
        self._schema = None if schema is None else schema_text(schema)
        self._filters = settings.filters
        self._finder = DuplicateFinder(exact=settings.duplicates.exact, near=settings.duplicates.near)

    def verdict(self, answer: Answer) -> Verdict | None:
        """None: a record."""
        if answer.status != "ok" or answer.text is None:
            return Verdict(answer.status, answer.problem)
        if self._schema is not None and (broken := violation(answer.text, self._schema)) is not None:
            return Verdict("invalid", broken)
        text = record_text(answer.text)
        if (unwanted := unwanted_because(text, self._filters)) is not None:
            return unwanted
        found = self._finder.check(answer.name, text)
        return None if found is None else Verdict(found[0], f"Jaccard {found[2]:.3f}", found[1])


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
    return None


def _strings(value: Any) -> Iterator[str]:
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            yield each
        children = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        stack += reversed([*children])


def _count(tally: _Tally, part: pa.Table, verdicts: list[tuple[int, Answer, Verdict | None]], job: PreparedJob) -> None:
    names = job.spec.synthesize.samplers if job.spec.synthesize is not None else {}
    drawn = {name: part.column(name).to_pylist() for name in names}
    for row, answer, verdict in verdicts:
        if verdict is not None:
            tally.dropped[verdict.reason] += 1
            continue
        tally.kept += 1
        tally.sample.add(answer.name, record_text(answer.text or ""))
        for name, values in drawn.items():
            tally.drawn[name][values[row]] += 1


def _report(job: PreparedJob, tally: _Tally) -> dict[str, Any]:
    samplers = job.template.samplers.samplers if job.template.samplers is not None else ()
    coverage = {each.name: {"drawn": len(tally.drawn[each.name]), "of": each.num_values} for each in samplers}
    return {
        "records": tally.kept,
        "dropped": dict(sorted(tally.dropped.items())),
        "diversity": {**tally.sample.figures(), "coverage": coverage},
    }


def _table(part: pa.Table, chosen: list[tuple[int, Answer, Verdict | None]], folder: str) -> pa.Table:
    ours = {each.name for each in result_fields(None)}
    kept = [name for name in part.schema.names if name not in ours]
    table = part.select(kept).take(pa.array([row for row, _, _ in chosen], pa.int64()))
    answers = [answer for _, answer, _ in chosen]
    values = [
        [answer.key[0] for answer in answers],
        [answer.key[1] for answer in answers],
        [answer.key[2] for answer in answers],
        [answer.text for answer in answers],
        [answer.num_rounds for answer in answers],
    ]
    for column, each in zip(RECORD_FIELDS, values, strict=True):
        table = table.append_column(column, pa.array(each, column.type))
    if folder == RECORDS:
        return table
    for column in DROPPED_FIELDS:
        reasons = [getattr(verdict, column.name) for _, _, verdict in chosen]
        table = table.append_column(column, pa.array(reasons, pa.string()))
    return table


def _encoded(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
