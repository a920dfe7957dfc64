"""Planning a retry: which rows, from how much of which parts, and parts that are refused before anything is spent."""

from __future__ import annotations

import gc
import random
import threading
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.work
from jobs.work import RunOptions, Selection, Work, find_work
from pipeline.counters import RunCounters, SampleFacts
from pipeline.engine import MoeShape
from pipeline.errors import RETRYABLE_KINDS, InfrastructureError
from pipeline.inputs import InputFile
from pipeline.ledger import Ledger
from pipeline.parts import commit_part, encode_part, part_sizes, read_footer, read_part
from pipeline.routing import summarize_row
from pipeline.rows import output_schema, routing_type
from pipeline.shards import Plan
from pipeline.storage import Store
from tests.whole_runs import snapshot

MOE = MoeShape(num_layers=4, num_experts=8, top_k=2)
FIELDS = {"model.source": '"tiny"'}
ROWS = 20
KINDS = ("engine_crash", "request_timeout", "prompt_too_long", "null_prompt")


@dataclass
class Output:
    """A finished run of parts with 20 input rows each, and what is in it."""

    ledger: Ledger
    samples: list[dict[str, Any]] = field(default_factory=list)
    job: Any = field(default_factory=lambda: SimpleNamespace(moe=MOE))

    @property
    def store(self) -> Store:
        return self.ledger.store

    def part_name(self, index: int) -> str:
        return self.ledger.plan.shard(index).part_name

    def rows_with(self, statuses: tuple[str, ...], kinds: frozenset[str] | None) -> dict[int, list[int]]:
        """Shard -> rows of which a sample has such a status and kind, in plain Python."""
        found: dict[int, set[int]] = {}
        for sample in self.samples:
            kind = (sample["error"] or {}).get("kind")
            if sample["status"] in statuses and (kinds is None or kind in kinds):
                found.setdefault(sample["input_row"] // ROWS, set()).add(sample["input_row"])
        return {index: sorted(rows) for index, rows in found.items()}


def write_output(root: str, *, num_parts: int = 6, text_bytes: int = 100, with_routing: bool = True) -> Output:
    """Every part but the last has failed rows; texts and expert ids are noise, which doesn't compress."""
    plan = Plan((InputFile("/in/a.parquet", "parquet", 100, "etag", num_parts * ROWS),), ROWS)
    output, rng = Output(Ledger(Store(root))), random.Random(1)
    output.ledger.open_run(plan, FIELDS, resume="if_possible")
    schema = output_schema([pa.field("text", pa.binary())], routing_type(MOE, tokens=True) if with_routing else None)
    for shard in plan:
        counters, records = RunCounters(), []
        for row in range(shard.start, shard.stop):
            failed = row % 5 == 1 and shard.index < num_parts - 1
            samples = [failed_sample(rng)] if failed else [sample(rng) for _ in range(rng.randint(1, 2))]
            facts = [facts_of(values, with_routing=with_routing) for values in samples]
            counters.add_row(facts, num_input_tokens=9, num_cached_tokens=0, moe=MOE, slice_name=f"s{row % 3}")
            records += [
                record_of(values, row, index, facts[index], rng.randbytes(text_bytes))
                for index, values in enumerate(samples)
            ]
        table = pa.Table.from_pylist(records, schema=schema)
        commit_part(output.store, shard.part_name, encode_part(table, counters.to_json_bytes(), {}))
        output.samples += records
    return output


def failed_sample(rng: random.Random) -> dict[str, Any]:
    return {"status": "failed", "kind": rng.choice(KINDS), "ids": None}


def sample(rng: random.Random) -> dict[str, Any]:
    ids = np.random.default_rng(rng.randrange(1 << 30)).random((13, MOE.num_layers, MOE.num_experts)).argsort(axis=-1)
    return {"status": rng.choice(("ok", "ok", "truncated")), "kind": None, "ids": ids[..., : MOE.top_k]}


def facts_of(values: dict[str, Any], *, with_routing: bool) -> SampleFacts:
    if values["ids"] is None:
        return SampleFacts("failed", error_kind=values["kind"])
    return SampleFacts(values["status"], 5, routing=summarize_row(values["ids"], 9, 5, MOE) if with_routing else None)


def record_of(values: dict[str, Any], row: int, index: int, facts: SampleFacts, noise: bytes) -> dict[str, Any]:
    error = {"kind": values["kind"], "message": "m", "stage": "s", "attempts": 1} if values["kind"] else None
    routing = facts.routing and {
        "prompt_expert_counts": facts.routing.prompt_counts,
        "completion_expert_counts": facts.routing.completion_counts,
        "repeat_first": facts.routing.repeat_first,
        "repeat_any": facts.routing.repeat_any,
        "expert_ids": noise,
    }
    return {
        "text": noise,
        "input_file": "a.parquet",
        "input_row": row,
        "sample_index": index,
        "status": values["status"],
        "num_input_tokens": 9,
        "num_cached_tokens": 0,
        "num_generated_tokens": facts.num_generated_tokens,
        "error": error,
        "routing": routing,
    }


def lists(work: Work) -> dict[int, list[int]]:
    return {index: list(rows) for index, rows in work.rows.items()}


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "out")
    return f"s3://{request.getfixturevalue('s3_bucket')}/out"


OPTIONS: dict[str, tuple[RunOptions, tuple[str, ...], frozenset[str] | None]] = {
    "run": (RunOptions(), ("failed",), RETRYABLE_KINDS),
    "retry": (RunOptions(only_failed=True), ("failed",), None),
    "one kind": (RunOptions(only_failed=True, kinds=("null_prompt",)), ("failed",), frozenset({"null_prompt"})),
    "truncated": (RunOptions(only_failed=True, statuses=("truncated",)), ("truncated",), None),
    "no such row": (RunOptions(only_failed=True, statuses=("invalid",)), ("invalid",), None),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_to_do_again_are_those_of_the_chosen_statuses_and_kinds(root: str, name: str) -> None:
    options, statuses, kinds = OPTIONS[name]
    output = write_output(root)
    work, before = find_work(output.ledger, output.job, options)
    assert lists(work) == output.rows_with(statuses, kinds)
    assert work.retried_statuses == (statuses if work.rows else None)
    assert work.shards == ()
    assert before == output.ledger.totals()


def failed_part(shard: int, *, every: int = 1) -> pa.Table:
    """The columns of a part of 4,096 rows that say which failed: each, or one in so many."""
    rows = np.arange(shard * 4096, (shard + 1) * 4096)
    status = np.where(rows % every == 0, "failed", "ok")
    return pa.table({"input_row": rows, "status": status})


@pytest.mark.parametrize(("every", "num_parts"), [(1, 245), pytest.param(4096, 2450, marks=pytest.mark.long)])
def test_rows_to_do_again_cost_the_driver_a_bit_each_however_many_they_are(every: int, num_parts: int) -> None:
    """A million failed rows in 245 parts; and single ones, each in a part of its own."""
    chosen = Selection(("failed",), None)
    tracemalloc.start()
    try:
        rows = {index: chosen.rows_of(failed_part(index, every=every)) for index in range(num_parts)}
        work = Work((), rows)
        gc.collect()
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"{work.num_single_rows:,} rows in {num_parts:,} parts: {num_bytes:,} bytes")
    assert work.num_single_rows == num_parts * 4096 // every
    assert num_bytes < 1_000_000
    assert work.rows[7][0] == 7 * 4096
    assert sum(map(sum, work.rows.values())) == sum(range(0, num_parts * 4096, every))


def test_missing_shards_are_work_whatever_is_done_again(tmp_path: Path) -> None:
    output = write_output(str(tmp_path))
    output.store.delete(f"data/{output.part_name(2)}")
    work, before = find_work(output.ledger, output.job, RunOptions(retry_failed=False))
    assert (work.shards, work.rows, before.totals.num_rows) == ((2,), {}, 5 * ROWS)


def test_a_run_without_routing_is_planned_as_well(tmp_path: Path) -> None:
    output = write_output(str(tmp_path), with_routing=False)
    output.job = SimpleNamespace(moe=None)
    work, _ = find_work(output.ledger, output.job, RunOptions(only_failed=True))
    assert lists(work) == output.rows_with(("failed",), None)


def test_only_footers_and_the_columns_that_decide_are_fetched(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_output(root, text_bytes=60_000)
    fetched: list[tuple[str, int]] = []
    read_range = Store.read_range

    def spy(self: Store, name: str, *, start: int, end: int) -> bytes:
        fetched.append((name, end - start))
        return read_range(self, name, start=start, end=end)

    def refuse(self: Store, name: str) -> bytes:
        raise AssertionError(f"{name} was read whole")

    plan, stored = output.ledger.plan, sum(part_sizes(output.store).values())
    monkeypatch.setattr(Store, "read_range", spy)
    monkeypatch.setattr(Ledger, "fingerprint", lambda self: FIELDS)
    monkeypatch.setattr(Store, "read", refuse)
    work, _ = find_work(output.ledger, output.job, RunOptions(only_failed=True))
    assert len(work.rows) == plan.num_shards - 1
    by_part = [name for name, _ in fetched]
    # Its footer twice, to find the part and to look at it; the rows' columns lie apart in two places, routing in one.
    assert all(by_part.count(f"data/{output.part_name(index)}") <= 2 + 3 for index in work.rows)
    assert by_part.count(f"data/{output.part_name(plan.num_shards - 1)}") == 1, "no failed row: its footer is enough"
    assert sum(size for _, size in fetched) < 0.1 * stored


def test_several_parts_are_looked_at_at_a_time_and_never_more_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = write_output(str(tmp_path), num_parts=40)
    look, lock, together = jobs.work.rows_to_retry, threading.Lock(), threading.Barrier(2)
    in_work, most, calls = 0, 0, 0

    def counted(*args: Any, **options: Any) -> list[int]:
        nonlocal in_work, most, calls
        with lock:
            in_work, calls = in_work + 1, calls + 1
            most, is_early = max(most, in_work), calls <= 2
        if is_early:
            together.wait(timeout=20)  # raises BrokenBarrierError when the second never comes beside the first
        try:
            return look(*args, **options)
        finally:
            with lock:
                in_work -= 1

    monkeypatch.setattr(jobs.work, "rows_to_retry", counted)
    work, _ = find_work(output.ledger, output.job, RunOptions(only_failed=True))
    assert list(lists(work).items()) == list(output.rows_with(("failed",), None).items())
    assert 2 <= most <= jobs.work._PART_THREADS
    assert calls == 39


def shifted_routing(table: pa.Table) -> pa.Table:
    """The same rows with each other's routing: every column but the footer still looks right."""
    index = table.schema.get_field_index("routing")
    return table.set_column(index, table.schema.field("routing"), table["routing"].take([0] * table.num_rows))


def test_a_part_whose_statistics_cannot_be_carried_over_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    output = write_output(str(tmp_path))
    for index in (3, 1):
        name = output.part_name(index)
        table = shifted_routing(read_part(output.store, name))
        commit_part(output.store, name, encode_part(table, read_footer(output.store, name).counters, {}))
    before = snapshot(tmp_path)
    with pytest.raises(
        InfrastructureError, match=rf"part {output.part_name(1)} in .*expert selections.*delete the part"
    ):
        find_work(output.ledger, output.job, RunOptions(only_failed=True))
    assert snapshot(tmp_path) == before
    kept = RunOptions(only_failed=True, statuses=("invalid",))
    assert find_work(output.ledger, output.job, kept)[0].rows == {}, "no row of these parts is touched"


def test_a_damaged_part_is_named_with_the_cure(tmp_path: Path) -> None:
    output = write_output(str(tmp_path))
    path = tmp_path / "data" / output.part_name(1)
    data = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group(0)
    column = next(leaf for leaf in map(group.column, range(group.num_columns)) if leaf.path_in_schema == "status")
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InfrastructureError, match=rf"part {output.part_name(1)} .*delete that one file"):
        find_work(output.ledger, output.job, RunOptions(only_failed=True))
