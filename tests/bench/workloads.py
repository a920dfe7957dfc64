"""The rows that contestants are measured on: seeded, the same for everybody, in every form that one of them reads.

Lengths of answers are decided here, as each row's `max_tokens`: with random weights an end of sequence is rare, though
respected, so all contestants generate the same tokens and their walls can be compared.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("river", "stone", "lamp", "garden", "winter", "copper", "harbour", "window", "letter", "market", "bridge")
NUM_DOCUMENTS, QUESTIONS_PER_DOCUMENT = 500, 8


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of one user turn, and how many tokens its answer has at most."""

    text: str
    max_tokens: int


def natural_mix(rng: random.Random) -> Row:
    """Log-normal lengths: prompts with a median of 60 words, answers of 40 tokens."""
    return Row(_words(rng, _log_normal(rng, 60, 0.6, 8, 300)), _log_normal(rng, 40, 0.8, 4, 200))


def heavy_tail(rng: random.Random) -> Row:
    """Answers of 16 tokens, and one in a hundred of 320."""
    return Row(_words(rng, 40), 320 if rng.random() < 0.01 else 16)


def many_short(rng: random.Random) -> Row:
    """As labelling has them: 40 words in, 2 tokens out."""
    return Row(_words(rng, 40), 2)


def long_prompts(rng: random.Random) -> Row:
    """700 words in, 8 tokens out."""
    return Row(_words(rng, 700), 8)


ROW_MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "natural": natural_mix,
    "tail": heavy_tail,
    "short": many_short,
    "long": long_prompts,
}
NAMES = (*ROW_MAKERS, "prefixes")


def rows_of(name: str, num_rows: int, *, seed: int = 1) -> list[Row]:
    """The first `num_rows` rows of a workload; more rows begin with the same ones, `prefixes` excepted."""
    rng = random.Random(f"{name}/{seed}")
    if name == "prefixes":
        return _shared_prefixes(rng, num_rows)
    return [ROW_MAKERS[name](rng) for _ in range(num_rows)]


def num_documents(num_rows: int) -> int:
    """How many documents so many rows of `prefixes` ask about; 500 for 4,000."""
    return max(1, min(NUM_DOCUMENTS, num_rows // QUESTIONS_PER_DOCUMENT))


def _shared_prefixes(rng: random.Random, num_rows: int) -> list[Row]:
    documents = [_words(rng, 250) for _ in range(num_documents(num_rows))]
    rows = [Row(f"{documents[n % len(documents)]}\nQuestion {n}: {_words(rng, 6)}?", 8) for n in range(num_rows)]
    rng.shuffle(rows)
    return rows


def write_rows(rows: list[Row], path: Path, token_ids: Callable[[str], list[int]]) -> Path:
    """Parquet with `messages`, `sampling` (JSON), `max_tokens` and `ids`, and beside it OpenAI's lines as `.jsonl`."""
    messages = [[{"role": "user", "content": row.text}] for row in rows]
    table = {
        "id": list(range(len(rows))),
        "messages": messages,
        "sampling": [json.dumps({"max_tokens": row.max_tokens}) for row in rows],
        "max_tokens": [row.max_tokens for row in rows],
        "ids": [token_ids(row.text) for row in rows],
    }
    pq.write_table(pa.table(table), path)
    lines = (
        json.dumps(
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "bench", "messages": chat, "max_tokens": row.max_tokens, "temperature": 0},
            }
        )
        for number, (row, chat) in enumerate(zip(rows, messages, strict=True))
    )
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    return path


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def _log_normal(rng: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    return min(most, max(least, round(rng.lognormvariate(math.log(median), sigma))))
