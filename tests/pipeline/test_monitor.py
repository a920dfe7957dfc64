"""The run's mailbox, as the plain object that the actor wraps."""

from __future__ import annotations

from pipeline.monitor import Figures, RunMonitor


def test_figures_only_grow_when_a_second_flow_counts_from_zero() -> None:
    monitor = RunMonitor()
    monitor.post("shards", Figures(rows_done=10, rows_failed=2, shards_done=1, generated_tokens=50))
    monitor.post("retries", Figures())
    assert monitor.read() == Figures(rows_done=10, rows_failed=2, shards_done=1, generated_tokens=50)
    monitor.post("retries", Figures(rows_done=1, generated_tokens=7))
    read = monitor.read()
    assert (read.rows_done, read.generated_tokens) == (11, 57)


def test_what_is_true_of_a_moment_is_the_latest_flows() -> None:
    monitor = RunMonitor()
    monitor.post("shards", Figures(rows_in_flight=9, replicas_up=2, shards_open=3))
    monitor.post("retries", Figures(rows_in_flight=1, replicas_up=1, shards_open=1))
    read = monitor.read()
    assert (read.rows_in_flight, read.replicas_up, read.shards_open) == (1, 1, 1)


def test_a_shard_committed_twice_counts_once() -> None:
    monitor = RunMonitor()
    for shard in (4, 4, 7):
        monitor.note_commit(shard)
    assert monitor.read().shards_committed == 2


def test_a_run_is_drained_only_when_the_order_was_heard_and_all_that_was_begun_is_committed() -> None:
    assert Figures(draining=True, shards_done=3, shards_committed=3).drained
    assert not Figures(draining=False, shards_done=3, shards_committed=3).drained
    assert not Figures(draining=True, shards_done=3, shards_committed=2).drained
    assert not Figures(draining=True, shards_open=1, shards_done=3, shards_committed=3).drained


def test_posting_returns_the_order_in_force() -> None:
    monitor = RunMonitor()
    assert monitor.post("shards", Figures()) == "run"
    monitor.give_order("drain")
    assert monitor.post("shards", Figures()) == "drain"
