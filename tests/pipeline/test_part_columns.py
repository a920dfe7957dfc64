"""Some columns of a part, by ranges: the same values as the whole part gives, in few requests, and no silent gaps."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import InfrastructureError
from pipeline.parts import PartFooter, commit_part, encode_part, open_part, part_sizes, read_part
from pipeline.storage import Store

NAME = "part-00000-000000000000.parquet"
NUM_ROWS = 3000
COUNTS = pa.list_(pa.uint32(), 4)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "local":
        return Store(str(request.getfixturevalue("tmp_path") / "out"))
    return Store(f"s3://{request.getfixturevalue('s3_bucket')}/out")


def part(num_rows: int = NUM_ROWS) -> pa.Table:
    rng = random.Random(num_rows)
    routing = [None if n % 3 == 0 else {"counts": [n, 1, 2, 3], "ids": rng.randbytes(50)} for n in range(num_rows)]
    errors = [{"kind": "bad", "message": "m"} if n % 7 == 0 else None for n in range(num_rows)]
    return pa.table(
        {
            "noise": pa.array([rng.randbytes(100) for _ in range(num_rows)], pa.binary()),
            "status": pa.array(rng.choices(["ok", "failed"], k=num_rows), pa.string()).dictionary_encode(),
            "input_row": pa.array(range(num_rows), pa.int64()),
            "text": pa.array([rng.randbytes(100) for _ in range(num_rows)], pa.binary()),
            "error": pa.array(errors, pa.struct([("kind", pa.string()), ("message", pa.string())])),
            "routing": pa.array(routing, pa.struct([("counts", COUNTS), ("ids", pa.binary())])),
            "nothing": pa.nulls(num_rows),
        }
    )


def read_columns(store: Store, columns: list[str], *, size: int | None = None) -> tuple[PartFooter, pa.Table]:
    opened = open_part(store, NAME, size=size)
    return opened.footer, opened.read(columns)


@pytest.mark.parametrize("num_rows", [0, 5, NUM_ROWS])
def test_columns_and_footer_are_those_of_the_whole_part(store: Store, num_rows: int) -> None:
    commit_part(store, NAME, encode_part(part(num_rows), b'{"rows":1}', {"shard": "0"}))
    names = ["status", "input_row", "error.kind", "routing.counts", "nothing"]
    footer, table = read_columns(store, names, size=part_sizes(store)[NAME])
    whole = read_part(store, NAME)
    assert (footer.num_rows, footer.counters, footer.extra) == (num_rows, b'{"rows":1}', {"shard": "0"})
    assert table.column_names == ["status", "input_row", "error", "routing", "nothing"]
    for name in ("status", "input_row", "nothing"):
        assert table[name].equals(whole[name])
    for name, child in (("error", "kind"), ("routing", "counts")):
        expected = [value and {child: value[child]} for value in whole[name].to_pylist()]
        assert table[name].to_pylist() == expected
    assert table.schema.metadata is None


def test_batches_are_the_same_rows_a_few_at_a_time(store: Store) -> None:
    commit_part(store, NAME, encode_part(part(), b"{}", {}))
    opened = open_part(store, NAME)
    batches = list(opened.batches(["routing.counts", "status"], num_rows=700))
    assert max(batch.num_rows for batch in batches) <= 700
    expected = opened.read(["routing.counts", "status"])
    assert pa.Table.from_batches(batches).to_pylist() == expected.to_pylist()


@pytest.mark.parametrize("size", [None, 5, 100_000, 10**9])
def test_a_size_that_is_unknown_or_out_of_date_costs_requests_and_nothing_else(store: Store, size: int | None) -> None:
    commit_part(store, NAME, encode_part(part(), b"{}", {}))
    assert read_columns(store, ["input_row"], size=size)[1]["input_row"].to_pylist() == list(range(NUM_ROWS))


@pytest.mark.parametrize("counters_size", [10, 200_000])
def test_neighbours_come_in_one_request_and_other_columns_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch, counters_size: int
) -> None:
    data = encode_part(part(), b"7" * counters_size, {})
    commit_part(store, NAME, data)
    ranges: list[int] = []
    read_range = Store.read_range

    def spy(self: Store, name: str, *, start: int, end: int) -> bytes:
        ranges.append(end - start)
        return read_range(self, name, start=start, end=end)

    monkeypatch.setattr(Store, "read_range", spy)
    footer, _ = read_columns(store, ["status", "input_row"], size=len(data))
    assert footer.counters == b"7" * counters_size
    assert len(ranges) == (2 if counters_size < 60_000 else 3)
    assert sum(ranges) < counters_size + 100_000 < len(data) / 3


def test_a_column_that_is_not_there_is_an_error_and_not_left_out(store: Store) -> None:
    commit_part(store, NAME, encode_part(part(5), b"{}", {}))
    with pytest.raises(InfrastructureError, match=rf"{NAME}.* it has no column routing.weights"):
        read_columns(store, ["status", "routing.weights"])


def test_a_missing_part_is_file_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        read_columns(store, ["status"])


@pytest.mark.parametrize("cut", [0, 3, 8, 200])
def test_a_cut_part_is_an_error_that_names_it_and_the_cure(tmp_path: Path, cut: int) -> None:
    store = Store(str(tmp_path))
    store.put(f"data/{NAME}", encode_part(part(5), b"{}", {})[:cut])
    with pytest.raises(InfrastructureError, match=f"{NAME}.*delete that one file"):
        read_columns(store, ["status"])


def test_a_flipped_bit_is_noticed_in_what_is_read_only(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    store, data = Store(str(tmp_path)), bytearray(encode_part(part(), b"{}", {}))
    column = pq.read_metadata(pa.BufferReader(bytes(data))).row_group(0).column(2)
    assert column.path_in_schema == "input_row"
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    store.put(f"data/{NAME}", bytes(data))
    with pytest.raises(InfrastructureError, match=f"{NAME}.*delete that one file"):
        read_columns(store, ["input_row"])
    assert read_columns(store, ["status"])[1].num_rows == NUM_ROWS


def test_a_store_that_goes_away_between_requests_is_said_to_be_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    commit_part(store, NAME, encode_part(part(), b"{}", {}))
    size, read_range = part_sizes(store)[NAME], Store.read_range

    def fail(self: Store, name: str, *, start: int, end: int) -> bytes:
        if end < size:
            raise TimeoutError("the network is down")
        return read_range(self, name, start=start, end=end)

    monkeypatch.setattr(Store, "read_range", fail)
    with pytest.raises(InfrastructureError, match=r"could not be fetched .*the network is down.*Rerun"):
        read_columns(store, ["input_row"])
