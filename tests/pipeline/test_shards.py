from __future__ import annotations

from array import array

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inputs import InputFile
from pipeline.jsonl import Marks
from pipeline.row_picks import pack
from pipeline.shards import Plan, Shard, make_plan, rows_per_shard


def files(*num_rows):
    return tuple(
        InputFile(f"f{i}", "parquet", 1, "v", rows, pa.schema([("x", pa.int64())])) for i, rows in enumerate(num_rows)
    )


plans = st.builds(
    lambda rows, size, limit: Plan(files(*rows), size, limit),
    st.lists(st.integers(0, 300), max_size=8),
    st.integers(1, 100),
    st.none() | st.integers(0, 1500),
)


@given(plans)
def test_shards_cover_the_planned_rows_exactly_once_in_file_order(plan):
    covered = [(shard.file_index, row) for shard in plan for row in range(shard.start, shard.start + shard.num_rows)]
    everything = [(index, row) for index, file in enumerate(plan.files) for row in range(file.num_rows)]
    assert covered == everything[: plan.limit]
    assert len(covered) == plan.num_rows


@given(plans)
def test_shards_are_numbered_never_empty_and_have_different_part_names(plan):
    shards = list(plan)
    assert [shard.index for shard in shards] == list(range(plan.num_shards))
    assert all(0 < shard.num_rows <= plan.rows_per_shard for shard in shards)
    assert len({shard.part_name for shard in shards}) == len(shards)


@given(plans)
def test_plan_survives_json(plan):
    assert Plan.from_json(plan.to_json()) == plan


def test_marks_and_schemas_survive_json():
    schema = pa.schema([("x", pa.list_(pa.struct([("role", pa.dictionary(pa.int32(), pa.string()))])))])
    file = InputFile("f", "jsonl", 9, "v", 100, schema, 7, Marks(array("q", [0, 3, 1, 64, 999, 70]), 64))
    again = Plan.from_json(Plan((file, file), 10).to_json())
    assert again.files == (file, file)
    assert again.files[0].marks.before(70) == (64, 999, 70)


def test_files_with_equal_schemas_share_one_copy():
    text = Plan(files(*[1] * 1000), 10).to_json()
    assert len(text) < 1000 * 200


def test_part_name_is_a_function_of_the_shard():
    assert Shard(7, 3, "f", 4096, 10).part_name == "part-00003-000000004096.parquet"


@pytest.mark.parametrize(
    ("num_rows", "replicas", "expected"),
    [(0, 1, 64), (200, 1, 64), (16_384, 1, 64), (100_000, 1, 390), (1_000_000, 64, 976), (100_000_000, 8, 4096)],
)
def test_shard_size_follows_rows_and_replicas(num_rows, replicas, expected):
    assert rows_per_shard(num_rows, replicas) == expected


def test_big_rows_make_small_shards():
    assert rows_per_shard(100_000_000, 8, row_bytes=1 << 20) == 256
    assert rows_per_shard(100_000_000, 8, row_bytes=1 << 30) == 1


def test_limit_counts_when_shards_are_sized():
    assert make_plan(files(1_000_000), replicas=1, limit=100).rows_per_shard == 64
    assert make_plan(files(50), replicas=1).num_shards == 1


def test_foreign_json_and_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="version"):
        Plan.from_json("{}")
    with pytest.raises(ValueError, match="rows_per_shard"):
        Plan((), 0)
    with pytest.raises(IndexError):
        Plan(files(3), 2).shard(2)


@st.composite
def picked_plans(draw):
    sizes = draw(st.lists(st.integers(0, 300), min_size=1, max_size=5))
    rows = [draw(st.none() | st.sets(st.integers(0, size - 1) if size else st.nothing())) for size in sizes]
    picks = [
        None if wanted is None else pack(np.array(sorted(wanted), np.int64), size)
        for wanted, size in zip(rows, sizes, strict=True)
    ]
    plan = Plan(files(*sizes), 8 * draw(st.integers(1, 12)), picks=tuple(picks))
    return plan, [range(size) if wanted is None else sorted(wanted) for wanted, size in zip(rows, sizes, strict=True)]


@given(picked_plans())
def test_of_files_with_picks_every_picked_row_is_in_exactly_one_shard_and_no_other(planned):
    plan, wanted = planned
    everything = [(index, row) for index, rows in enumerate(wanted) for row in rows]
    covered = []
    for shard in plan:
        rows = range(shard.start, shard.stop) if shard.picked_rows is None else shard.picked_rows.tolist()
        assert 0 < len(rows) == shard.num_rows
        assert all(shard.start <= row < shard.stop for row in rows)
        covered += [(shard.file_index, row) for row in rows]
    assert covered == everything
    assert len(covered) == plan.num_rows
    assert len({shard.part_name for shard in plan}) == plan.num_shards
    assert Plan.from_json(plan.to_json()) == plan
    for number, place in enumerate(everything):
        shard, row = plan.find(number)
        assert (shard.file_index, row) == place
        assert row in range(shard.start, shard.stop)


def test_picks_belong_to_whole_plans_without_a_limit():
    some = (pack(np.array([1]), 9),)
    with pytest.raises(ValueError, match="every file or none"):
        Plan(files(9, 9), 8, picks=some)
    with pytest.raises(ValueError, match="never together with a limit"):
        Plan(files(9), 8, 5, some)
    with pytest.raises(ValueError, match="multiple of 8"):
        Plan(files(9), 9, picks=some)
    with pytest.raises(ValueError, match="outside a file of 9 rows"):
        pack(np.array([9]), 9)
