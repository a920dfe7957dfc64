"""The run's mailbox, as the plain object that the actor wraps."""

from __future__ import annotations

import time

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
        monitor.note_commit(shard, 10)
    assert monitor.read().shards_committed == 2


def test_a_run_is_drained_only_when_the_order_was_heard_and_all_that_was_begun_is_committed() -> None:
    assert Figures(draining=True, shards_done=3, shards_committed=3).drained
    assert not Figures(draining=False, shards_done=3, shards_committed=3).drained
    assert not Figures(draining=True, shards_done=3, shards_committed=2).drained
    assert not Figures(draining=True, shards_open=1, shards_done=3, shards_committed=3).drained


def test_posting_returns_the_order_in_force() -> None:
    monitor = RunMonitor()
    assert monitor.post("shards", Figures())[0] == "run"
    monitor.give_order("drain")
    assert monitor.post("shards", Figures())[0] == "drain"


def test_posting_returns_how_many_of_the_flows_own_rows_are_committed() -> None:
    monitor = RunMonitor()
    monitor.note_commit(4, 100)
    assert monitor.post("shards", Figures(shards_done=2, rows_handed_on=150)) == ("run", 100)
    monitor.note_commit(5, 50)
    monitor.note_commit(5, 50)
    assert monitor.post("shards", Figures(shards_done=2, rows_handed_on=150)) == ("run", 150)
    assert monitor.post("retries", Figures()) == ("run", 0)
    monitor.note_commit(9, 3)
    assert monitor.post("retries", Figures(shards_done=1, rows_handed_on=3)) == ("run", 3)


def test_dispatch_is_silent_only_while_it_has_work_and_says_nothing() -> None:
    monitor = RunMonitor()
    assert monitor.read().silent_s == 0
    monitor.post("flow", Figures(shards_open=1))
    time.sleep(0.05)
    assert 0.05 <= monitor.read().silent_s < 5
    monitor.post("flow", Figures(shards_open=1))
    assert monitor.read().silent_s < 0.05
    monitor.post("flow", Figures(shards_open=0))
    time.sleep(0.05)
    assert monitor.read().silent_s == 0


def test_a_dispatch_process_in_its_second_life_is_known_to_have_died() -> None:
    monitor = RunMonitor()
    monitor.post("flow", Figures(shards_open=0))
    assert not monitor.read().dispatch_died
    monitor.note_dispatch_death()
    assert monitor.read().dispatch_died
