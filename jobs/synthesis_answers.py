"""Each sample's last answer: what the run gave, or a later round that asked for it again.

Reads committed parts only, in the order of the plan, so that what follows from them depends on no order of work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.ledger import Ledger
from pipeline.parts import read_part
from pipeline.record_fields import SOURCE
from pipeline.shards import Shard
from pipeline.storage import Store

Key = tuple[str, int, int]
"""Input file, row in it, sample."""
BROKEN = ("invalid", "truncated")


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample as it stands."""

    key: Key
    status: str
    text: str | None
    problem: str | None
    """What is wrong with it; None for nothing."""
    num_rounds: int = 0
    """How often it was asked for again."""
    words: str | None = None
    """What of the text was generated, where that isn't all of it."""

    @property
    def name(self) -> str:
        """Its key in one word, as records name each other."""
        return f"{self.key[0]}:{self.key[1]}:{self.key[2]}"


def read_answers(
    store: Store, later: Mapping[Key, Answer]
) -> Iterator[tuple[Shard, pa.Table, list[tuple[int, Answer]]]]:
    """Of each shard its part, and its answers with their rows there, by input row and sample; `later` ones replace."""
    for shard in Ledger(store).plan:
        part = read_part(store, shard.part_name)
        mine = sorted(
            enumerate(_answers(part, ("input_file", "input_row", "sample_index"))), key=lambda each: each[1].key
        )
        yield shard, part, [(row, later.get(answer.key, answer)) for row, answer in mine]


def answers_of_round(store: Store, number: int) -> dict[Key, Answer]:
    """What a round that asked again was answered; rows that failed there are left out: the answer before stands."""
    found = answers_to_questions(store, Ledger(store).plan, number)
    return {key: answer for key, answer in found.items() if answer.status != "failed"}


def answers_to_questions(store: Store, shards: Iterable[Shard], number: int = 0) -> dict[Key, Answer]:
    """What a run over questions that name their samples was answered, in these shards of it."""
    parts = (read_part(store, shard.part_name) for shard in shards)
    return {answer.key: answer for part in parts for answer in _answers(part, SOURCE, number)}


def shards_by_file(store: Store) -> dict[str, list[Shard]]:
    """Of each input file of a run, by its bare name, the shards with its rows."""
    plan, found = Ledger(store).plan, dict[str, list[Shard]]()
    for shard in plan:
        found.setdefault(plan.files[shard.file_index].path.rpartition("/")[2], []).append(shard)
    return found


def _answers(part: pa.Table, names: tuple[str, str, str], number: int = 0) -> Iterator[Answer]:
    columns = [part.column(name).to_pylist() for name in (*names, "status", "generated_text", "error")]
    tokens = part.column("num_generated_tokens").to_pylist()
    for (file, row, sample, status, text, error), generated in zip(zip(*columns, strict=True), tokens, strict=True):
        yield Answer((file, row, sample), status, text, _problem(status, error, generated), number)


def _problem(status: str, error: Mapping[str, Any] | None, generated: int | None) -> str | None:
    if status == "truncated":
        return f"it was cut off after {generated} tokens, the most there may be (sampling.max_tokens)"
    return str(error["message"]) if error is not None else None
