"""A part has each row once, with statistics that fit, however often the task that writes it is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.counters import RunCounters, SampleFacts
from pipeline.datasink import OVERLAID_BY, PartSink
from pipeline.engine import MoeShape
from pipeline.errors import InfrastructureError
from pipeline.generate import attach_counters
from pipeline.inputs import InputFile
from pipeline.monitor import start_monitor
from pipeline.parts import part_path, read_footer, read_part
from pipeline.recount import check_part
from pipeline.routing import RowRouting, summarize_row
from pipeline.rows import output_schema, routing_type
from pipeline.shards import Plan
from pipeline.storage import Store

MOE = MoeShape(num_layers=2, num_experts=4, top_k=2)
NUM_ROWS = 6
PLAN = Plan((InputFile("f0", "parquet", 1, "v", NUM_ROWS, pa.schema([("x", pa.int64())])),), NUM_ROWS)
PART = PLAN.shard(0).part_name


def block(statuses: dict[int, str], *, seed: int = 0) -> pa.Table:
    """What generation hands to the sink: these rows of the shard, with routing for those that aren't failed."""
    counters, records = RunCounters(), []
    for row, status in statuses.items():
        routing = routing_of(seed + row) if status != "failed" else None
        facts = (
            SampleFacts(status, error_kind="engine_crash") if routing is None else SampleFacts(status, 2, None, routing)
        )
        counters.add_row([facts], num_input_tokens=1, num_cached_tokens=0, moe=MOE)
        records.append(record_of(row, facts))
    table = pa.Table.from_pylist(records, schema=output_schema([], routing_type(MOE, tokens=False)))
    return attach_counters(table, 0, counters.to_json_bytes())


def routing_of(seed: int) -> RowRouting:
    scores = np.random.default_rng(seed).random((2, MOE.num_layers, MOE.num_experts))
    return summarize_row(np.argsort(scores, axis=-1)[..., : MOE.top_k], 1, 2, MOE)


def record_of(row: int, facts: SampleFacts) -> dict[str, object]:
    routing = facts.routing and {
        "prompt_expert_counts": facts.routing.prompt_counts,
        "completion_expert_counts": facts.routing.completion_counts,
        "repeat_first": facts.routing.repeat_first,
        "repeat_any": facts.routing.repeat_any,
    }
    error = {"kind": facts.error_kind, "message": "m", "stage": "s", "attempts": 1} if facts.error_kind else None
    return {
        "input_file": "f0",
        "input_row": row,
        "sample_index": 0,
        "status": facts.status,
        "num_input_tokens": 1,
        "num_cached_tokens": 0,
        "num_generated_tokens": facts.num_generated_tokens,
        "error": error,
        "routing": routing,
    }


@pytest.fixture
def new_sink(local_ray: None, local: Store) -> Any:
    """Makes the sink of another flow into one output."""
    import ray

    plan, monitor = ray.put(PLAN), start_monitor()

    def make(retried_statuses: tuple[str, ...] | None) -> PartSink:
        return PartSink(local, plan, monitor, fingerprint="f", epoch=None, retried_statuses=retried_statuses)

    yield make
    ray.kill(monitor)


def first_pass(new_sink: Any) -> None:
    """Rows 1, 3 and 4 of the part are failed."""
    new_sink(None).write([block({row: "failed" if row in (1, 3, 4) else "ok" for row in range(NUM_ROWS)})], None)


def statuses_in(store: Store) -> list[str]:
    """The part's statuses by row, after checking that each row is there once and that the footer agrees."""
    table = read_part(store, PART)
    assert table["input_row"].to_pylist() == list(range(NUM_ROWS))
    assert check_part(RunCounters.from_json_bytes(read_footer(store, PART).counters), table) == []
    return [str(status) for status in table["status"].to_pylist()]


def test_a_retrys_write_task_that_dies_after_its_commit_leaves_the_part_of_one_write(
    local: Store, new_sink: Any, tmp_path: Path
) -> None:
    import ray

    first_pass(new_sink)
    death = tmp_path / "death"
    once = tmp_path / "committed"
    sink, redone = new_sink(("failed",)), block({1: "ok", 3: "failed", 4: "ok"}, seed=9)

    def write(sink: PartSink, redone: pa.Table) -> None:
        sink.write([redone], None)
        if not death.exists():
            death.touch()
            once.write_bytes(sink._store.read(part_path(PART)))
            os._exit(137)

    ray.get(ray.remote(max_retries=1)(write).remote(sink, redone))
    assert death.exists()
    assert statuses_in(local) == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert local.read(part_path(PART)) == once.read_bytes()
    assert ray.get(sink._monitor.read.remote()).shards_committed == 1


def test_another_execution_lays_its_rows_over_a_part_that_was_retried_before(local: Store, new_sink: Any) -> None:
    first_pass(new_sink)
    assert OVERLAID_BY not in read_footer(local, PART).extra
    new_sink(("failed",)).write([block({1: "ok", 3: "failed", 4: "failed"}, seed=9)], None)
    before = read_footer(local, PART).extra
    new_sink(("failed",)).write([block({3: "ok", 4: "failed"}, seed=9)], None)
    assert statuses_in(local) == ["ok", "ok", "ok", "ok", "failed", "ok"]
    after = read_footer(local, PART).extra
    assert after["fingerprint"] == before["fingerprint"] == "f"
    assert after[OVERLAID_BY] != before[OVERLAID_BY]


def test_a_whole_shard_written_twice_is_one_part(local: Store, new_sink: Any) -> None:
    first_pass(new_sink)
    once = local.read(part_path(PART))
    first_pass(new_sink)
    assert local.read(part_path(PART)) == once
    assert statuses_in(local) == ["ok", "failed", "ok", "failed", "failed", "ok"]


def test_an_answer_is_never_replaced_by_a_failure_that_may_pass(local: Store, new_sink: Any) -> None:
    new_sink(None).write([block({row: "truncated" if row in (1, 3) else "ok" for row in range(NUM_ROWS)})], None)
    before = local.read(part_path(PART))
    new_sink(("truncated",)).write([block({1: "ok", 3: "failed"}, seed=9)], None)
    assert local.read(part_path(PART)) == before
    new_sink(("truncated",)).write([block({1: "ok", 3: "ok"}, seed=9)], None)
    assert statuses_in(local) == ["ok"] * NUM_ROWS


def test_a_part_is_put_again_where_the_storage_was_away_and_not_where_it_refuses(
    local: Store, new_sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.datasink.RETRY_AFTER_S", (0.01, 0.01))
    errors: list[OSError] = []
    put = Store.put

    def failing(store: Store, name: str, data: bytes) -> None:
        if errors and name == part_path(PART):
            raise errors.pop()
        put(store, name, data)

    monkeypatch.setattr(Store, "put", failing)
    errors += [ConnectionError("away"), ConnectionError("away")]
    first_pass(new_sink)
    assert statuses_in(local).count("failed") == 3
    for error, attempts in ((OSError(28, "No space left on device"), 1), (ConnectionError("away"), 3)):
        errors[:] = [error] * attempts
        with pytest.raises(InfrastructureError, match="could not be written"):
            first_pass(new_sink)
        assert not errors
