"""Shards that are being generated: each row keeps its first outcome, and a shard is done with its last row's."""

from __future__ import annotations

import pytest

from pipeline.engine import Piece, Request
from pipeline.errors import InfrastructureError
from pipeline.outcomes import OpenShards, Outcome
from pipeline.replica_answers import ReducedSample, RowResult, failed
from pipeline.settings import SamplingSettings

REQUEST = Request("", [1], SamplingSettings(), None)


@pytest.fixture
def told() -> list[str]:
    """What `shards` tells of outcomes."""
    return []


@pytest.fixture
def shards(told: list[str]) -> OpenShards:
    return OpenShards(lambda _, outcome: told.append(text_of(outcome) + " copied" * outcome.copied))


def good(text: str) -> Outcome:
    return Outcome(RowResult("", (ReducedSample(0, text, 1, "stop", None, None, None, False, None),)), 1)


def text_of(outcome: Outcome | None) -> str:
    assert outcome is not None
    return outcome.result.samples[0].text if outcome.result.samples else "failed"


def test_a_row_keeps_its_first_outcome_and_a_shard_is_done_with_its_last(shards: OpenShards, told: list[str]) -> None:
    shard = shards.open([REQUEST, None, REQUEST])
    assert shards.leading_rows(shard, None) == [(0, 0), (0, 2)]
    shards.settle((0, 0), good("a"))
    shards.settle((0, 0), good("late"))
    assert not shard.done.is_set()
    shards.settle((0, 2), good("c"))
    assert shard.done.is_set()
    assert [outcome and text_of(outcome) for outcome in shard.outcomes] == ["a", None, "c"]
    assert told == ["a", "c"]
    shards.close(shard)
    shards.settle((0, 0), good("later still"))
    assert told == ["a", "c"]


def test_equal_rows_wait_for_one_and_later_ones_take_its_outcome_over(shards: OpenShards, told: list[str]) -> None:
    first = shards.open([REQUEST] * 3)
    assert shards.leading_rows(first, [b"x", b"y", b"x"]) == [(0, 0), (0, 1)]
    assert shards.num_leading_rows == 2
    shards.settle((0, 0), good("x"))
    second = shards.open([REQUEST])
    assert shards.leading_rows(second, [b"x"]) == []
    assert second.done.is_set()
    assert told == ["x copied", "x", "x copied"]


def test_when_a_row_is_forgotten_one_that_waited_for_it_takes_its_place(shards: OpenShards) -> None:
    first, second = shards.open([REQUEST]), shards.open([REQUEST] * 2)
    shards.leading_rows(first, [b"x"])
    assert shards.leading_rows(second, [b"x", b"x"]) == []
    shards.close(first)
    assert shards.forget(first.keys) == [(1, 0)]
    shards.settle((1, 0), good("x"))
    assert second.done.is_set()


def test_a_failed_outcome_is_for_those_that_wait_and_no_later_one(shards: OpenShards) -> None:
    first, second = shards.open([REQUEST] * 2), shards.open([REQUEST])
    shards.leading_rows(first, [b"x", b"x"])
    shards.settle((0, 0), Outcome(failed("", "engine_crash", "it died"), 3))
    assert first.done.is_set()
    assert shards.leading_rows(second, [b"x"]) == [(1, 0)]


def test_what_no_replica_has_seen_is_dropped_and_the_rest_stays(shards: OpenShards) -> None:
    first, second = shards.open([REQUEST]), shards.open([REQUEST])
    shards.note_begun((0, 0))
    assert shards.unbegun() == [second]
    shards.drop([second])
    assert (first.done.is_set(), second.done.is_set(), second.dropped) == (False, True, True)
    shards.settle((0, 0), good("a"))
    assert shards.unfinished() == [second]


def test_a_failed_run_ends_every_shard_with_the_reason(shards: OpenShards) -> None:
    first, second = shards.open([REQUEST]), shards.open([REQUEST])
    shards.fail("no replica is left")
    assert first.done.is_set()
    assert second.done.is_set()
    assert isinstance(shards.failure, InfrastructureError)
    assert shards.failure.message == "no replica is left"


def test_a_piece_reaches_who_follows_the_row_and_marks_it(shards: OpenShards) -> None:
    seen: list[tuple[int, str]] = []
    shard = shards.open([REQUEST] * 2, lambda position, piece: seen.append((position, piece.text)))
    deaf = shards.open([REQUEST])
    shards.pass_on((shard.token, 1), Piece("r", 0, "hello", 1))
    shards.pass_on((deaf.token, 0), Piece("r", 0, "nobody", 1))
    shards.pass_on((99, 0), Piece("r", 0, "nobody", 1))
    assert seen == [(1, "hello")]
    assert [shards.is_streamed(key) for key in [(0, 0), (0, 1), (1, 0), (99, 0)]] == [False, True, False, False]
