"""Requests that wait at a replica go by priority and arrival, and come back from the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine import ONLINE_PRIORITY, Request
from pipeline.settings import SamplingSettings
from pipeline.waiting_requests import WaitingRequests

arrivals = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([ONLINE_PRIORITY, -10, 0, 10]), st.integers(1, 8))
)


def queued(arrived: list[tuple[str, int, int]]) -> tuple[WaitingRequests, list[Request]]:
    """The queue, and what is in it in the order in which it ought to go."""
    waiting, requests = WaitingRequests(), []
    for number, (consumer, priority, n) in enumerate(arrived):
        sampling = SamplingSettings(n=n, temperature=1.0)
        requests.append(Request(f"{consumer}/{number}", [1], sampling, 1, priority=priority))
        waiting.push(requests[-1])
    return waiting, sorted(requests, key=lambda request: request.priority)


def rest(waiting: WaitingRequests) -> list[str]:
    return [waiting.pop().request_id for _ in range(len(waiting))]


def ids(requests: list[Request]) -> list[str]:
    return [request.request_id for request in requests]


@given(arrivals)
def test_the_urgent_go_first_and_equals_in_order_of_arrival(arrived: list[tuple[str, int, int]]) -> None:
    waiting, ordered = queued(arrived)
    assert not ordered or waiting.first == ordered[0]
    online = sum(request.sampling.n for request in ordered if request.priority <= ONLINE_PRIORITY)
    assert waiting.samples_up_to(ONLINE_PRIORITY) == online
    assert rest(waiting) == ids(ordered)


@given(arrivals, st.sampled_from(["a", "b", None]), st.integers(0, 10))
def test_those_called_back_are_the_ones_that_would_have_come_last(
    arrived: list[tuple[str, int, int]], consumer: str | None, count: int
) -> None:
    waiting, ordered = queued(arrived)
    mine = [each for each in ids(ordered) if consumer is None or each.startswith(consumer)]
    wanted = mine[max(0, len(mine) - count) :]
    assert sorted(ids(waiting.take_back(consumer, count))) == sorted(wanted)
    assert rest(waiting) == [each for each in ids(ordered) if each not in wanted]


@given(arrivals)
def test_removed_requests_are_gone_and_unknown_ones_ignored(arrived: list[tuple[str, int, int]]) -> None:
    waiting, ordered = queued(arrived)
    gone = set(ids(ordered)[::2])
    waiting.remove(gone | {"nobody/1"})
    assert rest(waiting) == [each for each in ids(ordered) if each not in gone]
