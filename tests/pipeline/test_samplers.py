"""What a row draws depends on its identity alone, and values come as often as they should."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from pipeline.rows import FILE, ROW
from pipeline.samplers import Sampler, Samplers

WEIGHTED = Sampler.weighted("tone", {"formal": 3, "angry": 1, "odd": 0.5})
YEARS = Sampler("year", range(1990, 2000))


def test_draws_are_pinned_so_that_a_new_release_draws_the_same() -> None:
    assert [WEIGHTED.draw(0, "a.parquet", row) for row in range(6)] == PINNED_TONES
    assert [YEARS.draw(0, "a.parquet", row) for row in range(6)] == PINNED_YEARS


PINNED_TONES = ["formal", "odd", "formal", "formal", "formal", "angry"]
PINNED_YEARS = [1999, 1995, 1990, 1998, 1992, 1993]


def test_values_come_as_often_as_their_weights_say() -> None:
    drawn = Counter(WEIGHTED.draw(1, "f", row) for row in range(9000))
    assert abs(drawn["formal"] - 6000) < 200
    assert abs(drawn["angry"] - 2000) < 150
    assert abs(drawn["odd"] - 1000) < 120
    years = Counter(YEARS.draw(1, "f", row) for row in range(5000))
    assert sorted(years) == list(range(1990, 2000))
    assert max(years.values()) < 600


def test_seed_name_file_and_row_all_count_and_samplers_are_independent() -> None:
    plain = [YEARS.draw(0, "f", row) for row in range(50)]
    assert plain != [YEARS.draw(1, "f", row) for row in range(50)]
    assert plain != [YEARS.draw(0, "g", row) for row in range(50)]
    assert plain != [Sampler("other", range(1990, 2000)).draw(0, "f", row) for row in range(50)]


def test_moving_the_input_and_cutting_it_otherwise_changes_nothing() -> None:
    def table(folder: str, rows: list[int]) -> pa.Table:
        return pa.table({FILE: [f"{folder}/x.parquet"] * len(rows), ROW: rows})

    here, there = (Samplers((WEIGHTED, YEARS), 4, root) for root in ("/a/", "s3://b/"))
    whole = here.add_columns(table("/a", list(range(20)))).select(["tone", "year"])
    pieces = [there.add_columns(table("s3://b", rows)) for rows in (list(range(7)), list(range(7, 20)))]
    assert pa.concat_tables(pieces).select(["tone", "year"]).equals(whole)
    assert whole.schema.types == [pa.string(), pa.int64()]
