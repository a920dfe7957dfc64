"""Who waits for whom among equal requests."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.twins import Twins, request_digest

A, B = b"a" * 16, b"b" * 16


def test_one_leads_the_others_follow_and_are_told() -> None:
    twins: Twins[int, str] = Twins()
    assert [twins.follows(key, A) for key in (1, 2, 3)] == [False, True, True]
    assert not twins.follows(4, B)
    assert twins.settled(1, "done", size=5) == [2, 3]
    assert (twins.known(A), twins.known(B)) == ("done", None)
    assert twins.settled(1, "late", size=5) == []


def test_a_failure_is_told_but_not_kept() -> None:
    twins: Twins[int, str] = Twins()
    twins.follows(1, A)
    twins.follows(2, A)
    assert twins.settled(1, "failed", size=0) == [2]
    assert twins.known(A) is None
    assert not twins.follows(3, A)


def test_what_is_kept_stays_within_its_bytes_and_the_least_recently_used_goes_first() -> None:
    twins: Twins[int, int] = Twins(max_bytes=100)
    for key in range(3):
        twins.follows(key, bytes([key]))
    twins.settled(0, 0, size=40)
    twins.settled(1, 1, size=40)
    assert twins.known(b"\0") == 0
    twins.settled(2, 2, size=40)
    assert [twins.known(bytes([key])) for key in range(3)] == [0, None, 2]
    twins.follows(3, b"\3")
    twins.settled(3, 3, size=101)
    assert [twins.known(bytes([key])) for key in range(4)] == [None] * 4


def test_a_dropped_leader_hands_over_to_the_first_that_waits_and_is_not_dropped() -> None:
    twins: Twins[int, str] = Twins()
    for key in range(4):
        twins.follows(key, A)
    assert twins.drop([0, 1]) == [2]
    assert twins.settled(0, "late", size=1) == []
    assert twins.settled(2, "done", size=1) == [3]
    assert twins.drop([9]) == []


@given(st.data())
def test_every_key_is_told_once_or_dropped_whatever_happens(data: st.DataObject) -> None:
    twins: Twins[int, int] = Twins(max_bytes=3)
    digests: dict[int, bytes] = {}
    leading: set[int] = set()
    ended: Counter[int] = Counter()
    for key in range(data.draw(st.integers(1, 30))):
        digests[key] = bytes([data.draw(st.integers(0, 3))])
        outcome = twins.known(digests[key])
        if outcome is not None:
            assert digests[outcome] == digests[key]
            ended[key] += 1
        elif not twins.follows(key, digests[key]):
            leading.add(key)
        if leading and data.draw(st.booleans()):
            leader = data.draw(st.sampled_from(sorted(leading)))
            leading.remove(leader)
            told = [leader, *twins.settled(leader, leader, size=data.draw(st.integers(0, 1)))]
            assert {digests[one] for one in told} == {digests[leader]}
            ended.update(told)
        if data.draw(st.booleans()):
            gone = {one for one in digests if not ended[one] and data.draw(st.booleans())}
            leading = (leading - gone) | set(twins.drop(gone))
            ended.update(gone)
    for leader in sorted(leading):
        ended.update([leader, *twins.settled(leader, leader, size=0)])
    assert ended == Counter(digests.keys())


def test_digests_differ_by_prompt_and_by_sampling() -> None:
    digests = {request_digest(ids, text) for ids in ([1, 2], [1, 2, 3], [258]) for text in ("{}", '{"max_tokens":1}')}
    assert len(digests) == 6
    assert request_digest([1, 2], "{}") == request_digest((1, 2), "{}")
