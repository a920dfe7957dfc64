"""The order in which rows go to an engine: their own, but for those that begin alike, which meet."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dispatch import DispatchBoard
from pipeline.fresh_rows import MAX_PASSED, MEMORY_ROWS, MIN_GAIN, FreshRows, prompt_bytes, shared_tokens

few_tokens = st.lists(st.sampled_from([0, 1, 255, 256, 65_536]), max_size=6)


def document(number: int, length: int = 250) -> list[int]:
    return random.Random(number).choices(range(32_000), k=length)


def drained(rows: FreshRows[int]) -> list[int]:
    taken, last = [], b""
    while rows:
        row, last = rows.take(after=last)
        taken.append(row)
    return taken


@given(few_tokens, few_tokens, few_tokens)
def test_what_two_prompts_share_is_counted_in_tokens(both: list[int], one: list[int], other: list[int]) -> None:
    expected = len(both)
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        expected += 1
    assert shared_tokens(prompt_bytes(both + one), prompt_bytes(both + other)) == expected


@given(st.data())
def test_every_row_comes_out_once_whatever_is_added_put_back_and_discarded(data: st.DataObject) -> None:
    prompts = [prompt_bytes(document(n % 3) + [n] * (n % 5)) for n in range(6)] + [b"", prompt_bytes([7])]
    rows: FreshRows[int] = FreshRows()
    here: set[int] = set()
    prompt_of, last, number = {}, b"", 0
    for step in data.draw(st.lists(st.sampled_from(["add", "add", "take", "put back", "discard"]), max_size=60)):
        if step == "add":
            number += 1
            prompt_of[number] = data.draw(st.sampled_from(prompts))
            rows.add(number, prompt_of[number])
            here.add(number)
        elif step == "discard":
            gone = {row for row in here if row % 4 == 0}
            rows.discard(lambda row, gone=gone: row in gone)  # type: ignore[misc]
            here -= gone
        elif here:
            row, last = rows.take(after=last)
            assert row in here
            assert last == prompt_of[row]
            here.remove(row)
            if step == "put back":
                rows.put_back(row, last)
                here.add(row)
        assert len(rows) == len(here)
    assert sorted(drained(rows)) == sorted(here)
    with pytest.raises(KeyError):
        rows.take()


def test_rows_that_begin_alike_meet_and_the_others_keep_their_order() -> None:
    rows: FreshRows[int] = FreshRows()
    for number in range(12):
        rows.add(number, prompt_bytes([*document(number % 4), number]))
    assert drained(rows) == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize(
    "prompts",
    [
        [[]] * 20,
        [[number] for number in range(20, 0, -1)],
        [document(number) for number in range(20)],
        [document(0) + document(number, 3) for number in range(20)],  # one system prompt: no row gains by another
        [[*document(number % 4, MIN_GAIN - 1), number] for number in range(20)],
    ],
    ids=["none", "short", "nothing shared", "all share", "little shared"],
)
def test_where_nothing_is_gained_rows_go_in_their_order(prompts: list[list[int]]) -> None:
    rows: FreshRows[int] = FreshRows()
    for number, prompt in enumerate(prompts):
        rows.add(number, prompt_bytes(prompt) if prompt else b"")
    assert drained(rows) == list(range(20))
    assert not rows.wants_more


def test_below_a_system_prompt_that_all_share_documents_meet() -> None:
    rows: FreshRows[int] = FreshRows()
    for number in range(9):
        rows.add(number, prompt_bytes(document(99) + document(number % 3) + [number]))
    assert drained(rows) == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_a_row_put_back_is_the_oldest() -> None:
    rows: FreshRows[int] = FreshRows()
    for number in range(4):
        rows.add(number, prompt_bytes(document(number)))
    first, second = rows.take(), rows.take()
    rows.put_back(*second)
    rows.put_back(*first)
    assert drained(rows) == [0, 1, 2, 3]


def test_a_row_unlike_all_others_is_not_kept_waiting_by_a_stream_of_them() -> None:
    rows: FreshRows[int] = FreshRows()
    rows.add(0, prompt_bytes([*document(1), 0]))
    _, last = rows.take()
    rows.add(1, prompt_bytes(document(2)))
    taken = []
    for number in range(2, 2 * MAX_PASSED):
        rows.add(number, prompt_bytes([*document(1), number]))
        row, last = rows.take(after=last)
        taken.append(row)
    assert taken.index(1) == MAX_PASSED


def shuffled(num_documents: int, seed: int = 1) -> list[int]:
    """Documents in the order in which rows ask about them, eight questions each."""
    rows = [number for number in range(num_documents) for _ in range(8)]
    random.Random(seed).shuffle(rows)
    return rows


def test_more_rows_are_wanted_only_where_those_that_begin_alike_lie_apart() -> None:
    apart: FreshRows[int] = FreshRows()
    side_by_side: FreshRows[int] = FreshRows()
    for number, which in enumerate(shuffled(50)):
        apart.add(number, prompt_bytes([*document(which), number]))
        side_by_side.add(number, prompt_bytes([*document(number // 8), number]))
    assert apart.wants_more
    assert not side_by_side.wants_more
    for number in range(3 * MEMORY_ROWS):
        apart.add(number, prompt_bytes(document(1000 + number)))
    assert not apart.wants_more


def computed_documents(sent: Iterator[tuple[str, int]], num_kept: int) -> int:
    """How often a document is computed if each engine keeps so many, the least recently used going first."""
    kept: dict[str, OrderedDict[int, None]] = {}
    computed = 0
    for replica, which in sent:
        mine = kept.setdefault(replica, OrderedDict())
        computed += which not in mine
        mine[which] = None
        mine.move_to_end(which)
        while len(mine) > num_kept:
            mine.popitem(last=False)
    return computed


def sent_rows(rows: list[int], *, replicas: int, num_open: int, by_prompt: bool) -> Iterator[tuple[str, int]]:
    """Which replica sees which document, with so many rows open at any time and replicas that finish one by one."""
    board: DispatchBoard[tuple[int, int]] = DispatchBoard(max_attempts=3)
    with_replica: dict[str, list[tuple[int, int]]] = {f"a-{n}": [] for n in range(replicas)}
    for name in with_replica:
        board.replica_up(name, window=16)
    keys = list(enumerate(rows))
    rng = random.Random(0)
    while keys or board.num_unfinished:
        arriving, keys = keys[: num_open - board.num_unfinished], keys[num_open - board.num_unfinished :]
        prompts = [prompt_bytes([*document(which), number]) for number, which in arriving]
        board.add_rows(arriving, prompts if by_prompt else None)
        while (assignment := board.next_assignment()) is not None:
            with_replica[assignment.replica] += assignment.keys
            yield from ((assignment.replica, which) for _, which in assignment.keys)
        name = rng.choice([name for name, mine in with_replica.items() if mine])
        board.finished(name, with_replica[name].pop(0))


@pytest.mark.parametrize("replicas", [1, 3])
def test_documents_are_computed_a_third_as_often_with_a_cache_that_holds_a_twentieth(replicas: int) -> None:
    rows = shuffled(200)
    counts = [
        computed_documents(sent_rows(rows, replicas=replicas, num_open=800, by_prompt=by_prompt), num_kept=10)
        for by_prompt in (False, True)
    ]
    assert counts[0] > 0.9 * len(rows)  # in the order given nearly each time
    assert counts[1] < 0.36 * len(rows)
