"""A whole run in miniature, through the real lease, ledger and parts: shards in, parts out, nothing generated.

Its rows are a pure function of the plan, so that any output can be checked against `expected_rows` without asking the
program under test.
"""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa

from pipeline.counters import RunCounters, SampleFacts, merge_all
from pipeline.inputs import InputFile
from pipeline.lease import acquire_lease
from pipeline.ledger import Ledger
from pipeline.parts import commit_part, encode_part
from pipeline.resume import fingerprint_digest
from pipeline.shards import Plan, Shard
from pipeline.storage import Store

FIELDS = {"model.source": '"tiny"', "prompt.template": '"{{ text }}"', "sampling.seed": "1"}
FILES = {"a.parquet": 5, "b.parquet": 0, "c.parquet": 4}


def small_plan(rows_per_shard: int = 3) -> Plan:
    files = tuple(InputFile(path, "parquet", 100, "etag", rows) for path, rows in FILES.items())
    return Plan(files, rows_per_shard)


def row(file: str, index: int) -> dict[str, Any]:
    failed = index == 1
    return {
        "input_file": file,
        "input_row": index,
        "status": "failed" if failed else "ok",
        "generated_text": None if failed else f"{file}:{index} " * (index + 1),
    }


def expected_rows() -> list[dict[str, Any]]:
    return [row(file, index) for file, rows in FILES.items() for index in range(rows)]


def counters_of(rows: list[dict[str, Any]]) -> RunCounters:
    counters = RunCounters()
    for number, values in enumerate(rows):
        kind = "engine_hang" if values["status"] == "failed" else None
        facts = SampleFacts(values["status"], num_generated_tokens=number, error_kind=kind)
        counters.add_row([facts], num_input_tokens=10 + values["input_row"], num_cached_tokens=0)
    return counters


def expected_totals() -> RunCounters:
    return merge_all(counters_of(rows_of(shard)) for shard in small_plan())


def rows_of(shard: Shard) -> list[dict[str, Any]]:
    return [row(shard.file, index) for index in range(shard.start, shard.start + shard.num_rows)]


def part_of(shard: Shard) -> bytes:
    rows = rows_of(shard)
    extra = {"shard": str(shard.index), "fingerprint": fingerprint_digest(FIELDS)}
    return encode_part(pa.Table.from_pylist(rows), counters_of(rows).to_json_bytes(), extra)


def mini_run(root: str) -> None:
    store = Store(root)
    with acquire_lease(store, run_id=f"run-{os.getpid()}") as lease:
        ledger = Ledger(store, lease=lease)
        plan = ledger.open_run(small_plan(), FIELDS, resume="if_possible").plan
        ledger.record_event("started")
        for index in ledger.todo():
            shard = plan.shard(index)
            lease.check()
            commit_part(store, shard.part_name, part_of(shard))
        ledger.record_event("finished")
        store.put("summary.json", ledger.totals().to_json_bytes())
