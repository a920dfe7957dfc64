"""The records of a synthesis: what was answered, less what is broken, unwanted or there already; nothing is lost.

One pass over committed parts in the order of the plan, and nothing else decides: done again it gives the same files.
Guarantees:
- every sample is once in `records/` or once in `dropped/`, there with the reason.
- a record follows the job's JSON schema, if it has one.
- of records that are alike the first stays, by input file, row and sample.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from jobs.prepare import PreparedJob
from jobs.synthesis_judge import NOT_ASKED, Judgement, encoded
from jobs.synthesis_turns import Talks, read_talks
from jobs.synthesis_verdicts import Sieve, Weighed, said_text
from pipeline.diversity import DiversitySample
from pipeline.record_fields import DROPPED_FIELDS, RECORD_FIELDS, SCORE
from pipeline.rows import result_fields
from pipeline.storage import Store

RECORDS, DROPPED = "records", "dropped"
_TURN = re.compile(r"(turn \d+(?:, \w+)?): ")


@dataclass(slots=True)
class _Tally:
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sample: DiversitySample = field(default_factory=DiversitySample)
    scores: Counter[int] = field(default_factory=Counter)
    broke_off: Counter[str] = field(default_factory=Counter)
    """Talks by the half turn that they came to."""
    drawn: dict[str, Counter[str | int]] = field(default_factory=lambda: defaultdict(Counter))


def write_records(job: PreparedJob, store: Store, talks: Talks, judgement: Judgement | None) -> dict[str, Any]:
    """Write both folders anew, and return what is in them and how diverse it is."""
    sieve, tally = Sieve(job), _Tally()
    before = [(folder, name) for folder in (RECORDS, DROPPED) for name in store.list(folder)]
    written: set[tuple[str, str]] = set()
    for shard, part, answers in read_talks(talks):
        found = judgement.of_part(shard.part_name) if judgement is not None else {}
        unasked = NOT_ASKED if judgement is not None else None
        weighed = [sieve.weigh(row, answer, found.get(answer.key, unasked)) for row, answer in answers]
        _count(tally, part, weighed, job)
        for folder in (RECORDS, DROPPED):
            chosen = [each for each in weighed if (each.verdict is None) == (folder == RECORDS)]
            if chosen:
                table = _table(part, chosen, scored=judgement is not None, dropped=folder == DROPPED)
                store.put(f"{folder}/{shard.part_name}", encoded(table))
                written.add((folder, shard.part_name))
    for folder, name in before:
        if (folder, name) not in written:
            store.delete(f"{folder}/{name}")
    return _report(job, tally, judged=judgement is not None)


def candidates(job: PreparedJob, talks: Talks) -> Iterator[tuple[str, pa.Table]]:
    """What would be records without a judge, of each part that has some, by its name."""
    sieve = Sieve(job)
    for shard, part, answers in read_talks(talks):
        chosen = [each for each in (sieve.weigh(row, answer) for row, answer in answers) if each.verdict is None]
        if chosen:
            yield shard.part_name, _table(part, chosen, scored=False, dropped=False)


def _count(tally: _Tally, part: pa.Table, weighed: Sequence[Weighed], job: PreparedJob) -> None:
    names = job.spec.synthesize.samplers if job.spec.synthesize is not None else {}
    drawn = {name: part.column(name).to_pylist() for name in names}
    for each in weighed:
        if each.score is not None:
            tally.scores[each.score] += 1
        if each.verdict is not None:
            tally.dropped[each.verdict.reason] += 1
            if (place := _TURN.match(each.verdict.detail or "")) is not None:
                tally.broke_off[place.group(1)] += 1
            continue
        tally.kept += 1
        tally.sample.add(each.answer.name, said_text(each.answer))
        for name, values in drawn.items():
            tally.drawn[name][values[each.row]] += 1


def _report(job: PreparedJob, tally: _Tally, *, judged: bool) -> dict[str, Any]:
    samplers = job.template.samplers.samplers if job.template.samplers is not None else ()
    coverage = {each.name: {"drawn": len(tally.drawn[each.name]), "of": each.num_values} for each in samplers}
    return {
        "records": tally.kept,
        "dropped": dict(sorted(tally.dropped.items())),
        **({"broke_off": dict(sorted(tally.broke_off.items()))} if tally.broke_off else {}),
        **({"scores": {str(score): tally.scores[score] for score in sorted(tally.scores)}} if judged else {}),
        "diversity": {**tally.sample.figures(), "coverage": coverage},
    }


def _table(part: pa.Table, chosen: Sequence[Weighed], *, scored: bool, dropped: bool) -> pa.Table:
    ours = {each.name for each in result_fields(None)}
    kept = [name for name in part.schema.names if name not in ours]
    table = part.select(kept).take(pa.array([each.row for each in chosen], pa.int64()))
    answers = [each.answer for each in chosen]
    values = [
        [answer.key[0] for answer in answers],
        [answer.key[1] for answer in answers],
        [answer.key[2] for answer in answers],
        [answer.text for answer in answers],
        [answer.num_rounds for answer in answers],
    ]
    for column, each in zip(RECORD_FIELDS, values, strict=True):
        table = table.append_column(column, pa.array(each, column.type))
    if scored:
        table = table.append_column(SCORE, pa.array([each.score for each in chosen], SCORE.type))
    for column in DROPPED_FIELDS if dropped else ():
        reasons = [getattr(each.verdict, column.name) for each in chosen]
        table = table.append_column(column, pa.array(reasons, pa.string()))
    return table
