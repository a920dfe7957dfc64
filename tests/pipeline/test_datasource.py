from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.datasource import ShardSource, read_plan
from pipeline.inputs import list_inputs
from pipeline.rows import READ_ERROR, ROW, SHARD
from pipeline.shards import Plan
from pipeline.user_schema import user_schema


@pytest.fixture
def plan(tmp_path):
    pq.write_table(pa.table({"x": range(230), "t": ["text"] * 230}), tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"x": {i}, "t": "{"y" * (i % 50)}"}}\n' for i in range(230, 300)))
    return Plan(tuple(list_inputs(str(tmp_path))), 50)


def tagged(table: pa.Table) -> pa.Table:
    """Summarize one batch: with batch_size=None a batch is a block."""
    shards = np.unique(table[SHARD].to_numpy()).tolist()
    return pa.table({"shards": [shards], "rows": [table[ROW].to_pylist()], "x": [table["x"].to_pylist()]})


def blocks(dataset):
    return dataset.map_batches(tagged, batch_format="pyarrow", batch_size=None).take_all()


@pytest.mark.usefixtures("local_ray")
def test_block_is_a_shard_and_every_row_comes_once(plan):
    schema = user_schema(plan.files, required=["t"])
    found = sorted(blocks(read_plan(plan, schema, shards=range(plan.num_shards))), key=lambda block: block["shards"])
    assert [block["shards"] for block in found] == [[index] for index in range(plan.num_shards)]
    assert [x for block in found for x in block["x"]] == list(range(300))


@pytest.mark.usefixtures("local_ray")
def test_only_the_listed_shards_and_rows_are_read(plan):
    schema = user_schema(plan.files, required=["t"])
    found = blocks(read_plan(plan, schema, shards=[5, 1], rows={1: [99, 51]}))
    assert sorted((block["shards"], block["rows"]) for block in found) == [
        ([1], [51, 99]),
        ([5], list(range(20)) + list(range(20, 50))),
    ]


@pytest.mark.usefixtures("local_ray")
def test_nothing_to_do_is_an_empty_dataset(plan):
    schema = user_schema(plan.files, required=["t"])
    assert blocks(read_plan(plan, schema, shards=[])) == []


@pytest.mark.usefixtures("local_ray")
def test_bad_rows_reach_the_next_stage(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\nbroken\n{"x": 3}\n')
    plan = Plan(tuple(list_inputs(str(tmp_path))), 2)
    rows = read_plan(plan, user_schema(plan.files, required=["x"]), shards=[0, 1]).take_all()
    assert sorted((row[ROW], row["x"], row[READ_ERROR] is None) for row in rows) == [
        (0, 1, True),
        (1, None, False),
        (2, 3, True),
    ]


def test_task_is_small_however_large_the_plan(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1, "t": "a"}\n' * 200_000)
    plan = Plan(tuple(list_inputs(str(tmp_path))) * 50, 4096)
    schema = user_schema(plan.files, required=["t"])
    (task,) = ShardSource(plan, schema, shards=[1000], rows={1000: range(81920, 86016)}).get_read_tasks(1)
    assert plan.num_shards > 1000
    assert len(pickle.dumps(task)) < 4000


def test_rows_outside_their_shard_are_refused(plan):
    schema = user_schema(plan.files, required=["t"])
    for row in (49, 100):
        with pytest.raises(ValueError, match="outside shard 1, which is rows 50 to 99"):
            ShardSource(plan, schema, shards=[1], rows={1: [row]}).get_read_tasks(1)


def test_task_says_how_many_rows_and_which_file(plan):
    schema = user_schema(plan.files, required=["t"])
    tasks = ShardSource(plan, schema, shards=[4, 5], rows={5: [0, 1]}).get_read_tasks(99)
    assert [(task.metadata.num_rows, list(task.metadata.input_files)) for task in tasks] == [
        (30, [plan.files[0].path]),
        (2, [plan.files[1].path]),
    ]
