"""Whose request an engine gets where people and runs share it: what is counted are sequences, not requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine import ONLINE_PRIORITY, EngineInfo, Request
from pipeline.making_way import MAX_MADE_WAY, kept_free, may_begin, who_makes_way
from pipeline.settings import SamplingSettings


def of_run(name: str = "run", n: int = 1) -> Request:
    return Request(name, [1], SamplingSettings(n=n, temperature=1.0), 1)


def of_people(n: int = 1) -> Request:
    return Request("people", [1], SamplingSettings(n=n, temperature=1.0), 1, priority=ONLINE_PRIORITY)


def test_runs_leave_sequences_free_only_while_people_ask() -> None:
    def kept(num_seqs: int, since_online_s: float, lookahead: int = 0) -> int:
        return kept_free(EngineInfo(num_seqs, 512, None, {}, lookahead), since_online_s=since_online_s)

    assert kept(64, since_online_s=1.0) == 8
    assert kept(4, since_online_s=1.0) == 1
    assert kept(1, since_online_s=1.0) == 0
    assert kept(64, since_online_s=60.0) == 0
    # What waits ahead of the sequences, in an engine with a core of its own, is no sequence that is free.
    assert kept(64, since_online_s=1.0, lookahead=8) == 16
    assert kept(64, since_online_s=60.0, lookahead=8) == 0


@given(st.integers(1, 64), st.integers(1, 8), st.lists(st.integers(1, 16), max_size=100))
def test_while_people_ask_runs_fill_no_more_than_their_share_whatever_their_samples(
    num_seqs: int, kept: int, samples: list[int]
) -> None:
    begun: list[Request] = []
    for number, n in enumerate(samples):
        used = sum(request.sampling.n for request in begun)
        if may_begin(of_run(str(number), n), free=num_seqs - used, kept=kept, begun=begun):
            begun.append(of_run(str(number), n))
    used = sum(request.sampling.n for request in begun)
    assert used <= max(0, num_seqs - kept) or len(begun) == 1


@pytest.mark.parametrize("n", [1, 4, 200])
def test_a_request_of_any_size_begins_once_the_others_of_its_run_are_done(n: int) -> None:
    assert may_begin(of_run(n=n), free=60, kept=8, begun=[of_people()])
    assert may_begin(of_run(n=n), free=60, kept=8, begun=[of_run()]) is (n <= 52)
    assert may_begin(of_people(n), free=1, kept=8, begun=[of_run()])


def test_without_people_an_engine_is_filled_to_its_last_sequence() -> None:
    assert may_begin(of_run(n=4), free=1, kept=0, begun=[of_run(n=4)])
    assert not may_begin(of_run(n=4), free=0, kept=0, begun=[])
    assert not may_begin(of_people(), free=0, kept=8, begun=[])


def test_as_many_make_way_as_there_are_samples_to_make_room_for() -> None:
    begun = [of_people(), of_run("a", 4), of_run("b", 4), of_run("c", 1), of_run("d", 4)]
    names = [[one.request_id for one in who_makes_way(begun, {}, num_wanted=wanted)] for wanted in (0, 1, 4, 5, 9, 99)]
    assert names == [[], ["a"], ["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]]
    tired = {"a": MAX_MADE_WAY, "b": MAX_MADE_WAY - 1}
    assert [one.request_id for one in who_makes_way(begun, tired, num_wanted=5)] == ["b", "c"]
