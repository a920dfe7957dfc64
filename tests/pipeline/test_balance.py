"""Which rows are called back from which replica when the input has run dry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.balance import Load, Recall, SpeedMeter, choose_recall


def test_the_slow_one_gives_so_much_that_both_are_done_together() -> None:
    # 40 rows at 1 row/s against none at 3: moving 30 leaves 10 s of work on both; the receiver runs 32 at once.
    loads = {"slow": Load(40, 8, 32, 1.0), "fast": Load(0, 32, 0, 3.0)}
    assert choose_recall(loads) == Recall("slow", 30)


def test_never_more_than_waits_there_or_can_run_here() -> None:
    assert choose_recall({"a": Load(40, 8, 5, 1.0), "b": Load(0, 32, 0, 3.0)}) == Recall("a", 5)
    assert choose_recall({"a": Load(40, 8, 32, 1.0), "b": Load(30, 32, 0, 3.0)}) == Recall("a", 2)


def test_a_replica_that_has_finished_nothing_yet_counts_as_fast_as_the_others() -> None:
    assert choose_recall({"old": Load(20, 8, 12, 2.0), "new": Load(0, 8, 0, None)}) == Recall("old", 8)


@pytest.mark.parametrize(
    "loads",
    [
        {"only": Load(40, 8, 32, 1.0)},
        {"a": Load(8, 8, 0, 1.0), "b": Load(0, 8, 0, 3.0)},  # nothing waits
        {"a": Load(40, 8, 32, 1.0), "b": Load(40, 8, 32, 3.0)},  # nobody is idle
        {"fast": Load(30, 8, 22, 10.0), "slow": Load(7, 8, 0, 1.0)},  # 3 s there, 7 s here
        {},
    ],
)
def test_nothing_moves_that_would_not_be_done_sooner(loads: dict[str, Load]) -> None:
    assert choose_recall(loads) is None


def test_for_people_who_wait_a_free_sequence_takes_what_waits_elsewhere_however_slow_it_is() -> None:
    loads = {"fast": Load(14, 8, 6, 10.0), "slow": Load(7, 8, 0, 1.0)}
    assert choose_recall(loads) is None
    assert choose_recall(loads, at_once=True) == Recall("fast", 1)


@given(
    loads=st.dictionaries(
        st.sampled_from("abcde"),
        st.builds(
            Load, st.integers(0, 60), st.integers(1, 32), st.integers(0, 40), st.none() | st.floats(0.01, 1000)
        ).filter(lambda load: load.num_recallable <= load.in_flight),
        max_size=5,
    )
)
def test_a_move_never_makes_the_last_one_done_later(loads: dict[str, Load]) -> None:
    recall = choose_recall(loads)
    if recall is None:
        return
    known = [load.rate for load in loads.values() if load.rate]
    usual = sum(known) / len(known) if known else 1.0
    giver = loads[recall.replica]
    assert 0 < recall.count <= giver.num_recallable
    idle = {name: load for name, load in loads.items() if load.in_flight < load.num_sequences}
    name = min(idle, key=lambda name: idle[name].in_flight / (idle[name].rate or usual))
    before = giver.in_flight / (giver.rate or usual)
    after = (idle[name].in_flight + recall.count) / (idle[name].rate or usual)
    assert after <= before * (1 + 1e-9)


def test_speed_is_rows_per_second_of_work_the_latest_weighing_most() -> None:
    meter = SpeedMeter()
    assert meter.rate is None
    meter.add(10, 5.0)
    assert meter.rate == pytest.approx(2.0)
    for _ in range(100):
        meter.add(50, 5.0)
    assert meter.rate == pytest.approx(10.0, rel=0.01)
