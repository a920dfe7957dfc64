from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError
from pipeline.parts import commit_part, committed_parts, encode_part, part_sizes, read_footer, read_part
from pipeline.storage import Store

NAME = "part-00000-000000000000.parquet"
TABLE = pa.table({"a": pa.array(["x", None, "x"]).dictionary_encode(), "b": [[1], None, [2, 3]], "c": pa.nulls(3)})


def test_committed_part_gives_back_rows_counters_and_extra(store: Store) -> None:
    commit_part(store, NAME, encode_part(TABLE, b'{"rows":3}', {"shard": "0"}))
    footer = read_footer(store, NAME)
    assert (footer.num_rows, footer.counters, footer.extra) == (3, b'{"rows":3}', {"shard": "0"})
    assert read_part(store, NAME).equals(TABLE)
    assert committed_parts(store) == {NAME}


def test_part_read_back_keeps_schema_and_foreign_metadata_but_not_ours(local: Store) -> None:
    table = TABLE.replace_schema_metadata({"theirs": "kept"})
    commit_part(local, NAME, encode_part(table, b"{}", {}))
    again = read_part(local, NAME)
    assert (again.schema, again.schema.metadata) == (table.schema, table.schema.metadata)


def test_equal_arguments_give_equal_bytes() -> None:
    assert encode_part(TABLE, b"{}", {"shard": "1"}) == encode_part(TABLE, b"{}", {"shard": "1"})


def test_empty_table_is_a_legal_part(local: Store) -> None:
    commit_part(local, NAME, encode_part(TABLE.slice(0, 0), b"{}", {}))
    assert read_footer(local, NAME).num_rows == 0
    assert read_part(local, NAME).equals(TABLE.slice(0, 0))


@pytest.mark.parametrize(("counters_size", "requests"), [(10, 1), (60_000, 1), (70_000, 2), (500_000, 2)])
def test_footer_of_any_length_is_read_without_the_rows(
    store: Store, monkeypatch: pytest.MonkeyPatch, counters_size: int, requests: int
) -> None:
    import numpy as np

    rows = pa.table({"noise": np.random.default_rng(0).integers(0, 1 << 60, 200_000)})
    data = encode_part(rows, b"7" * counters_size, {})
    commit_part(store, NAME, data)
    ranges: list[int] = []
    read_range = Store.read_range

    def spy(self: Store, name: str, *, start: int, end: int) -> bytes:
        ranges.append(end - start)
        return read_range(self, name, start=start, end=end)

    monkeypatch.setattr(Store, "read_range", spy)
    footer = read_footer(store, NAME, size=part_sizes(store)[NAME])
    assert footer.counters == b"7" * counters_size
    assert len(ranges) == requests
    assert sum(ranges) < counters_size + 70_000 < len(data)


@pytest.mark.parametrize("wrong", [5, 100, 10**9])
def test_footer_is_found_though_the_size_is_out_of_date(store: Store, wrong: int) -> None:
    commit_part(store, NAME, encode_part(TABLE, b"{}", {}))
    assert read_footer(store, NAME, size=wrong).num_rows == 3


def test_committing_twice_replaces(store: Store) -> None:
    commit_part(store, NAME, encode_part(TABLE, b"1", {}))
    commit_part(store, NAME, encode_part(TABLE.slice(1), b"2", {}))
    assert (read_footer(store, NAME).counters, read_part(store, NAME).num_rows) == (b"2", 2)


def test_missing_part_is_file_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        read_footer(store, NAME)
    with pytest.raises(FileNotFoundError):
        read_part(store, NAME)


@pytest.mark.parametrize("cut", [0, 3, 8, 200])
def test_cut_part_is_an_error_that_names_it_and_the_cure(local: Store, cut: int) -> None:
    local.put(f"data/{NAME}", encode_part(TABLE, b"{}", {})[:cut])
    for read in (read_footer, read_part):
        with pytest.raises(InfrastructureError, match=f"{NAME}.*delete that one file"):
            read(local, NAME)


def test_flipped_bit_in_a_page_is_noticed(local: Store) -> None:
    plain = pa.table({"text": ["the same text again"] * 3})
    data = bytearray(encode_part(plain, b"{}", {}))
    meta = pq.read_metadata(pa.BufferReader(bytes(data))).row_group(0).column(0)
    data[meta.data_page_offset + meta.total_compressed_size // 2] ^= 1
    local.put(f"data/{NAME}", bytes(data))
    with pytest.raises(InfrastructureError, match=NAME):
        read_part(local, NAME)


def test_parquet_file_of_somebody_else_is_not_a_part(local: Store) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    local.put(f"data/{NAME}", sink.getvalue().to_pybytes())
    with pytest.raises(InfrastructureError, match="no statistics"):
        read_footer(local, NAME)


def test_refused_write_is_infrastructure_error_that_says_what_is_safe(local: Store) -> None:
    local.put("data", b"a file where the folder should be")
    with pytest.raises(InfrastructureError, match=r"Committed parts are safe"):
        commit_part(local, NAME, b"x")


def test_hidden_and_underscore_files_are_not_parts(local: Store) -> None:
    for name in (".DS_Store", "_SUCCESS", NAME):
        local.put(f"data/{name}", b"")
    assert committed_parts(local) == {NAME}


@pytest.mark.parametrize(
    ("counters", "extra"), [(b"\xff", {}), (b"{}", {"counters": "x"}), (b"{}", {"schema_version": "1"})]
)
def test_footer_that_readers_would_refuse_is_not_written(counters: bytes, extra: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"counters|reserved"):
        encode_part(TABLE, counters, extra)
