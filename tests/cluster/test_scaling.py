"""How many replicas a fleet wants, and when a pool is given up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.pools import UNBOUNDED, PoolPlan
from cluster.scaling import MAX_BACKOFF_S, MAX_FAILED_STARTS, StartRecord, wanted_replicas
from tests.scripted_engine import ScriptedConfig


def pool(least: int, most: int, seqs: int = 10) -> PoolPlan:
    return PoolPlan(f"pool-{least}-{most}", least, ScriptedConfig(), max_num_seqs=seqs, max_replicas=most)


def test_a_replica_for_every_window_of_rows_in_the_order_of_the_spec() -> None:
    pools = [pool(1, 3), pool(0, 2, seqs=5)]
    for rows, wanted in [(0, [1, 0]), (20, [1, 0]), (21, [2, 0]), (60, [3, 0]), (61, [3, 1]), (10_000, [3, 2])]:
        assert wanted_replicas(pools, rows) == wanted


def test_as_many_as_may_be_while_nobody_has_said_what_there_is_to_do() -> None:
    assert wanted_replicas([pool(1, 3), pool(0, 2)], None) == [3, 2]


@given(
    rows=st.integers(0, 10_000),
    more=st.integers(0, 10_000),
    bounds=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), min_size=1, max_size=4),
)
def test_more_work_never_wants_fewer_replicas_and_bounds_hold(
    rows: int, more: int, bounds: list[tuple[int, int]]
) -> None:
    pools = [pool(least, least + extra) for least, extra in bounds]
    few, many = wanted_replicas(pools, rows), wanted_replicas(pools, rows + more)
    assert all(a <= b for a, b in zip(few, many, strict=True))
    assert all(p.num_replicas <= n <= p.most for p, n in zip(pools, many, strict=True))


def test_rows_for_which_a_pool_has_no_room_go_to_the_next_one() -> None:
    endless, other = pool(1, UNBOUNDED), pool(0, 8)
    assert wanted_replicas([endless, other], 1_000_000, attainable=[4, 8]) == [4, 8]
    assert wanted_replicas([pool(0, 8), other], 8_000, attainable=[0, 8]) == [0, 8]
    assert wanted_replicas([endless, other], None, attainable=[4, 3]) == [4, 3]
    # The fewest are wanted whether or not there is room, but cover no rows until they are there.
    assert wanted_replicas([pool(2, 2), other], 40, attainable=[0, 8]) == [2, 2]


def test_starts_that_fail_are_tried_again_ever_later_and_given_up_after_five() -> None:
    record = StartRecord(backoff_s=1.0)
    waits = []
    for attempt in range(MAX_FAILED_STARTS):
        assert record.diagnosis is None
        now = 100.0 * (attempt + 1)
        record.failed(now, "no such weights", began=now - 10)
        waits.append(record.not_before - now)
    assert waits == [1, 2, 4, 8, 16]
    assert record.diagnosis == "no such weights (5 starts failed in a row)"
    assert record.exit_code == 3


def test_starts_that_fail_side_by_side_count_once() -> None:
    record = StartRecord(backoff_s=1.0)
    for replica in range(8):
        record.failed(100.0 + replica, "the hub is away", began=50.0)
    assert (record.failures, record.diagnosis) == (1, None)


def test_a_success_begins_the_count_again_and_the_wait_has_a_limit() -> None:
    record = StartRecord(backoff_s=50.0)
    record.failed(10.0, "x", began=5.0)
    record.failed(20.0, "x", began=15.0)
    assert record.not_before == 20.0 + MAX_BACKOFF_S
    record.succeeded()
    assert (record.failures, record.not_before, record.diagnosis) == (0, 0.0, None)


def test_settings_that_are_wrong_are_not_tried_twice() -> None:
    record = StartRecord(backoff_s=1.0)
    record.failed(2.0, "unknown argument", began=1.0, final_exit_code=2)
    assert (record.diagnosis, record.exit_code) == ("unknown argument", 2)


def test_a_replica_that_dies_young_is_waited_for_without_a_verdict() -> None:
    record = StartRecord(backoff_s=2.0)
    for _ in range(20):
        record.died_young(10.0)
    assert (record.not_before, record.diagnosis) == (12.0, None)
