"""How many rows are open at once: enough to keep engines busy, whatever the lengths, and few enough to lose."""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.open_rows import MAX_CALLS, OPEN_FACTOR, OpenRows, num_calls

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=600)


@given(sizes, st.integers(1, 20_000))
def test_whatever_the_sizes_the_calls_are_few_and_enough_rows_for_the_limit_fit_in_them(
    shard_rows: list[int], limit: int
) -> None:
    calls = num_calls(shard_rows, limit, twin_factor=1)
    assert 1 <= calls <= min(len(shard_rows), MAX_CALLS)
    if calls < min(len(shard_rows), MAX_CALLS):
        neighbours = zip(*(shard_rows[start:] for start in range(calls)), strict=False)
        assert all(sum(rows) >= limit for rows in neighbours)


def test_small_shards_among_large_ones_are_open_together() -> None:
    assert num_calls([4096] * 250, 1600, twin_factor=1) == 2
    assert num_calls([4096] * 250, 1600, twin_factor=4) == 8
    assert num_calls([1] * 10_000 + [4096] * 250, 1600, twin_factor=1) == MAX_CALLS
    assert num_calls([1] * 3, 1600, twin_factor=4) == 3


def test_what_a_kill_may_cost_is_what_may_be_begun_and_uncommitted() -> None:
    limits = OpenRows.of(32, 64)
    assert (limits.unfinished, limits.begun, limits.uncommitted, limits.lookahead) == (112, 256, 256, 256)
    assert OpenRows.of(1024, 64).uncommitted == OpenRows.of(1024, 64).unfinished
    assert OpenRows.of(1024, 64).lookahead == 2048
    assert limits.at_risk() == 256 + 256 + 128
    assert limits.at_risk(looks_ahead=True) == limits.at_risk() + 256


@given(
    window=st.integers(1, 4096),
    rows_per_shard=st.integers(1, 4096),
    looks_ahead=st.booleans(),
    finished_first=st.floats(0, 1),
)
def test_no_more_is_ever_open_than_is_said_to_be_at_risk(
    window: int, rows_per_shard: int, looks_ahead: bool, finished_first: float
) -> None:
    limits = OpenRows.of(window, rows_per_shard)
    begun = uncommitted = 0
    while limits.allow(
        unfinished=int(begun * (1 - finished_first)), begun=begun, uncommitted=uncommitted, looks_ahead=looks_ahead
    ):
        begun += rows_per_shard
        if begun > limits.begun:  # whole, and handed on
            begun, uncommitted = begun - rows_per_shard, uncommitted + rows_per_shard
    assert begun + uncommitted <= limits.at_risk(looks_ahead=looks_ahead)


def busy_share(limits: OpenRows, num_seqs: int, seconds: Callable[[random.Random], float], num_rows: int) -> float:
    """Of one replica's sequences, on average until the input has run dry; rows of a shard are sent in order."""
    rng = random.Random(1)
    size = limits.rows_per_shard
    shards = deque([seconds(rng) for _ in range(size)] for _ in range(num_rows // size))
    waiting: deque[tuple[float, int]] = deque()
    running: list[tuple[float, int]] = []
    missing: Counter[int] = Counter()
    now = used = spent = 0.0
    number = 0
    while shards:
        unfinished = len(waiting) + len(running)
        if limits.allow(unfinished=unfinished, begun=size * len(missing), uncommitted=0, looks_ahead=False):
            waiting.extend((each, number) for each in shards.popleft())
            missing[number] = size
            number += 1
            continue
        while waiting and len(running) < num_seqs:
            each, shard = waiting.popleft()
            heapq.heappush(running, (now + each, shard))
        ends, shard = heapq.heappop(running)
        used, spent, now = used + (len(running) + 1) * (ends - now), spent + ends - now, ends
        missing -= Counter([shard])
    return used / spent / num_seqs


LENGTHS: dict[str, Callable[[random.Random], float]] = {
    "exponential": lambda rng: rng.expovariate(1),
    "log-normal, cut": lambda rng: min(5.0, rng.lognormvariate(0, 0.8)),
    "one in a hundred 20 times as long": lambda rng: 20.0 if rng.random() < 0.01 else rng.uniform(0.9, 1.1),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("num_seqs", "rows_per_shard", "least"), [(64, 64, 0.98), (256, 64, 0.98), (512, 256, 0.8)])
def test_engines_are_busy_whatever_the_lengths(num_seqs: int, rows_per_shard: int, least: float, lengths: str) -> None:
    limits = OpenRows.of(2 * num_seqs, rows_per_shard)
    assert busy_share(limits, num_seqs, LENGTHS[lengths], 20_000) > least


def test_that_takes_more_than_one_begun_row_for_each_to_be_done() -> None:
    limits = OpenRows.of(1024, 256)
    tail = LENGTHS["one in a hundred 20 times as long"]
    shares = [
        busy_share(OpenRows(**(fields_of(limits) | {"begun": factor * 1536 + 256})), 512, tail, 20_000)
        for factor in range(1, OPEN_FACTOR + 1)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[-1] > 0.8


def fields_of(limits: OpenRows) -> dict[str, int]:
    return {name: getattr(limits, name) for name in OpenRows.__slots__}
