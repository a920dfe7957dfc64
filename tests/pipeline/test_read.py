from __future__ import annotations

import os
import resource

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import parquet_rows, read, row_batch
from pipeline.errors import InfrastructureError
from pipeline.inputs import list_inputs
from pipeline.read import read_shard
from pipeline.rows import FILE, READ_ERROR, ROW, SHARD, read_fields
from pipeline.shards import Plan, Shard, make_plan
from pipeline.user_schema import user_schema
from tests.reading import plan_of, read_all, read_errors

# -- Parquet --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_rows=st.integers(0, 400), group=st.integers(1, 150), size=st.integers(1, 130), batch=st.integers(1, 70))
def test_shards_of_any_size_give_every_row_once_in_order(tmp_path, num_rows, group, size, batch):
    path = tmp_path / "a.parquet"
    text = [None if i % 7 == 0 else f"t{i % 5}" for i in range(num_rows)]
    pq.write_table(pa.table({"x": range(num_rows), "t": pa.array(text, pa.string())}), path, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_rows, "_MAX_BATCH_ROWS", batch)
        plan, schema = plan_of(path, size)
        tables = [read_shard(plan.files[0], shard, schema) for shard in plan]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(row["x"], row["t"], row[ROW]) for row in rows] == [(i, text[i], i) for i in range(num_rows)]
    assert all(row[FILE] == str(path) and row[READ_ERROR] is None for row in rows)
    assert [row[SHARD] for row in rows] == [i // size for i in range(num_rows)]


def test_schema_is_the_runs_whatever_the_file(tmp_path):
    chat = pa.list_(pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string())]))
    pq.write_table(
        pa.table({
            "messages": pa.array([[{"role": "user", "content": "hi"}], None], chat),
            "n": pa.array([1, 2], pa.int8()),
            "kind": pa.array(["a", "b"]).dictionary_encode(),
            "big": pa.array(["x", None], pa.large_string()),
            "t": pa.array(["p", "q"]),
        }),
        tmp_path / "a.parquet",
    )  # fmt: skip
    pq.write_table(pa.table({"n": pa.array([3], pa.int64()), "t": pa.array([None], pa.null())}), tmp_path / "b.parquet")
    plan, schema = plan_of(tmp_path)
    tables = [read_shard(plan.files[shard.file_index], shard, schema) for shard in plan]
    expected = pa.schema([*schema, *read_fields()])
    assert [table.schema for table in tables] == [expected, expected]
    assert schema.field("kind").type == pa.dictionary(pa.int32(), pa.string())
    assert schema.field("n").type == pa.int64()
    assert tables[0].select(schema.names).to_pylist()[0] == {
        "messages": [{"role": "user", "content": "hi"}],
        "n": 1,
        "kind": "a",
        "big": "x",
        "t": "p",
    }
    assert tables[1].select(schema.names).to_pylist() == [
        {"messages": None, "n": 3, "kind": None, "big": None, "t": None}
    ]


def test_only_asked_columns_come_back_even_none(tmp_path):
    pq.write_table(pa.table({"x": [1, 2], "y": [3, 4], "x.y": [5, 6]}), tmp_path / "a.parquet")
    assert read_all(tmp_path, schema=pa.schema([("x", pa.int64())]))["x"].to_pylist() == [1, 2]
    assert read_all(tmp_path, schema=pa.schema([("x.y", pa.int64())]))["x.y"].to_pylist() == [5, 6]
    assert read_all(tmp_path, schema=pa.schema([]))[ROW].to_pylist() == [0, 1]


def test_rows_can_be_picked_for_a_retry(tmp_path):
    pq.write_table(pa.table({"x": range(100)}), tmp_path / "a.parquet")
    plan, schema = plan_of(tmp_path, 40)
    assert read_shard(plan.files[0], plan.shard(1), schema, keep=[41, 79])["x"].to_pylist() == [41, 79]


def test_changed_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1, 2]}), path)
    plan, schema = plan_of(path)
    os.utime(path, ns=(5, 5))
    with pytest.raises(InfrastructureError, match=r"a\.parquet changed since the run was planned"):
        read_shard(plan.files[0], plan.shard(0), schema)
    path.unlink()
    with pytest.raises(InfrastructureError, match=r"a\.parquet, rows 0 to 1: could not be read \(FileNotFoundError"):
        read_shard(plan.files[0], plan.shard(0), schema)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_corrupt_page_names_file_and_rows_and_loses_nothing_silently(tmp_path, compression):
    path = tmp_path / "a.parquet"
    text = [os.urandom(20).hex() for _ in range(2000)]
    pq.write_table(
        pa.table({"t": text}), path, compression=compression, use_dictionary=False, write_page_checksum=False
    )
    data = bytearray(path.read_bytes())
    data[4:300] = b"\xff" * 296
    path.write_bytes(data)
    plan, schema = plan_of(path, 500)
    with pytest.raises(InfrastructureError, match=r"a\.parquet, rows 500 to 999"):
        read_shard(plan.files[0], plan.shard(1), schema)


def test_text_that_is_not_utf8_spoils_its_row_alone(tmp_path):
    raw = pa.array([b"ok", b"\xff\xfe", b"fine", b"ok"])
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    chat = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), text)
    for columns in ({"t": text}, {"t": chat}, {"t": text.dictionary_encode()}):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        table = read_all(tmp_path)
        assert [value is None for value in table["t"].to_pylist()] == [False, True, False, False]
        assert [bool(error) for error in read_errors(table)] == [False, True, False, False]
        assert "'t' holds text that is not UTF-8" in read_errors(table)[1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(8)), batch=st.integers(1, 70))
def test_shards_read_in_any_order_by_one_process_are_the_same(tmp_path, order, batch):
    path = tmp_path / "a.parquet"
    if not path.exists():
        pq.write_table(pa.table({"x": range(400), "t": [f"t{i % 90}" for i in range(400)]}), path, row_group_size=170)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_rows, "_MAX_BATCH_ROWS", batch)
        parquet_rows._parked.clear()
        plan, schema = plan_of(path, 50)
        for index in order:
            table = read_shard(plan.files[0], plan.shard(index), schema)
            assert table["x"].to_pylist() == list(range(index * 50, index * 50 + 50))


def test_row_group_is_decoded_once_for_shards_read_in_order(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": range(10_000)}), path)
    plan, schema = plan_of(path, 100)
    opened = []
    real = parquet_rows._Cursor
    monkeypatch.setattr(parquet_rows, "_Cursor", lambda *arguments: opened.append(1) or real(*arguments))
    for index in range(0, 100, 3):
        read_shard(plan.files[0], plan.shard(index), schema)
    assert len(opened) == 1


def test_rewritten_file_is_not_read_from_the_place_kept_in_the_old_one(tmp_path):
    path = tmp_path / "a.parquet"
    for first in (0, 1000):
        pq.write_table(pa.table({"x": range(first, first + 200)}), path)
        os.utime(path, ns=(first, first))
        plan, schema = plan_of(path, 50)
        for index in (0, 2):
            table = read_shard(plan.files[0], plan.shard(index), schema)
            assert table["x"].to_pylist()[0] == first + index * 50


# -- limits ---------------------------------------------------------------------------------------------------------


def bomb(path, kind, cell_bytes, num_rows):
    """A file of about 100 kB: one value in a dictionary, repeated."""
    values = pa.array(["x" * cell_bytes])
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_rows, np.int32)), values)
    if kind == "list":
        text = pa.ListArray.from_arrays(pa.array(np.arange(num_rows + 1, dtype=np.int32)), text)
    table = pa.table({"n": range(num_rows), "t": text})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    assert path.stat().st_size < 1 << 20


@pytest.mark.parametrize("kind", ["text", "list"])
def test_parquet_bomb_stays_within_the_budget_of_a_shard(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(read, "MAX_SHARD_BYTES", 64 << 20)
    path = tmp_path / "a.parquet"
    bomb(path, kind, 8 << 20, 1000)  # 8 GB when decoded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = read_all(path)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 1024
    assert table["n"].to_pylist()[:7] == list(range(7))
    assert [bool(error) for error in read_errors(table)] == [
        row >= table.num_rows - read_errors(table)[::-1].index(None) for row in range(1000)
    ]
    assert 7 <= read_errors(table).count(None) <= 8
    assert "GiB of its shard" in read_errors(table)[-1]


@pytest.mark.parametrize("kind", ["text", "list"])
def test_one_huge_value_is_a_bad_row(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(row_batch, "MAX_CELL_BYTES", 1 << 20)
    values = pa.array(["a", "x" * (2 << 20), "b"])
    values = values if kind == "text" else pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), values)
    pq.write_table(pa.table({"t": values}), tmp_path / "a.parquet")
    table = read_all(tmp_path)
    assert [bool(error) for error in read_errors(table)] == [False, True, False]
    assert "column 't' holds a value above" in read_errors(table)[1]
    assert table["t"].to_pylist()[1] is None


# -- object storage -------------------------------------------------------------------------------------------------


def test_s3_files_read_like_local_ones_and_a_changed_one_is_noticed(s3_bucket, tmp_path):
    pq.write_table(pa.table({"t": [f"t{i}" for i in range(300)]}), tmp_path / "a.parquet", row_group_size=70)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"t": "j{i}"}}\n' for i in range(300)))
    client = fsspec.filesystem("s3", skip_instance_cache=True)
    for name in ("a.parquet", "b.jsonl"):
        client.put(str(tmp_path / name), f"{s3_bucket}/in/{name}")
    plan = make_plan(list_inputs(f"s3://{s3_bucket}/in"), replicas=1)
    plan = Plan.from_json(plan.to_json())
    schema = user_schema(plan.files, required=["t"])
    tables = [read_shard(plan.files[shard.file_index].slim(shard.start), shard, schema) for shard in plan]
    assert pa.concat_tables(tables)["t"].to_pylist() == [f"t{i}" for i in range(300)] + [f"j{i}" for i in range(300)]
    client.pipe_file(f"{s3_bucket}/in/b.jsonl", b'{"t": "new"}\n')
    shard = plan.shard(plan.num_shards - 1)
    with pytest.raises(InfrastructureError, match=r"b\.jsonl changed"):
        read_shard(plan.files[1], shard, schema)


def test_plan_that_promises_more_rows_than_the_file_has_is_an_error(tmp_path):
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "a.parquet")
    plan, schema = plan_of(tmp_path)
    with pytest.raises(InfrastructureError, match="gave 2 rows instead of 3"):
        read_shard(plan.files[0], Shard(0, 0, plan.files[0].path, 0, 3), schema)
