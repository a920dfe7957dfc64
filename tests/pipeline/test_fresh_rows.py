"""The order in which rows go to an engine: their own, but for those that begin alike, which meet."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dispatch import DispatchBoard
from pipeline.fresh_rows import MAX_PASSED, MEMORY_ROWS, MIN_GAIN, NEAR, FreshRows, prompt_bytes, shared_tokens
from pipeline.open_rows import OpenRows

WINDOW, SHARD = 32, 64
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
    both = [9] * MIN_GAIN + both
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


def wants_more(prompts: Iterable[list[int]]) -> bool:
    rows: FreshRows[int] = FreshRows()
    for number, prompt in enumerate(prompts):
        rows.add(number, prompt_bytes(prompt))
        if len(rows) > 300:
            rows.take()
    return rows.wants_more


def test_more_rows_are_wanted_where_those_that_begin_alike_lie_apart() -> None:
    assert wants_more([*document(which), number] for number, which in enumerate(shuffled(50)))
    few = [[*document(which), number] for number, which in enumerate(shuffled(50))]
    assert not wants_more([*few, *([number] for number in range(3 * MEMORY_ROWS))]), "short ones since"
    assert not wants_more([*few, *(document(1000 + number) for number in range(3 * MEMORY_ROWS))]), "others since"


@pytest.mark.parametrize(
    "prompt",
    [
        lambda number: [*document(number // 8), number],  # side by side
        lambda number: [*document(number % NEAR), number],
        lambda number: [*document(0, 128), *document(number, 9)],  # a system prompt
        lambda number: [*document(number % 2, 128), *document(number, 9)],  # two of them
        lambda number: [*document(0 if number % 300 else number, 128), *document(number, 9)],  # and one without it
        document,
    ],
    ids=["neighbours", "near", "system prompt", "two", "one without", "nothing shared"],
)
def test_no_more_rows_are_wanted_where_like_ones_are_near_or_there_are_none(
    prompt: Callable[[int], list[int]],
) -> None:
    assert not wants_more(prompt(number) for number in range(900))


def test_a_run_that_is_to_end_goes_in_order() -> None:
    rows: FreshRows[int] = FreshRows()
    for number in range(12):
        rows.add(number, prompt_bytes([*document(number % 4), number]))
    first, last = rows.take()
    rows.go_in_order()
    assert [first, *(rows.take(after=last)[0] for _ in range(11))] == list(range(12))


def test_rows_put_back_go_next_whatever_else_begins_alike() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    board.replica_up("a", window=8)
    board.add_rows(range(8), [prompt_bytes(document(50 + n)) for n in range(8)])
    assert board.next_assignment() is not None
    board.add_rows(range(8, 300), [prompt_bytes([*document(1), n]) for n in range(292)])
    for key in range(8):
        board.returned("a", key)
    board.replica_up("b", window=200)
    board.drain("a")
    sent = board.next_assignment()
    assert sent is not None
    assert set(sent.keys) >= set(range(8))


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


def sent_rows(rows: list[int], *, replicas: int, by_prompt: bool) -> Iterator[tuple[str, int]]:
    """Which replica sees which document, with shards opened as a run opens them and replicas that finish one by one."""
    board: DispatchBoard[tuple[int, int]] = DispatchBoard(max_attempts=3)
    with_replica: dict[str, list[tuple[int, int]]] = {f"a-{n}": [] for n in range(replicas)}
    for name in with_replica:
        board.replica_up(name, window=WINDOW)
    limits = OpenRows.of(WINDOW * replicas, SHARD)
    shards = deque(list(enumerate(rows))[start : start + SHARD] for start in range(0, len(rows), SHARD))
    missing: Counter[int] = Counter()
    rng = random.Random(0)
    while shards or board.num_unfinished:
        begun = SHARD * len(missing)
        counts = {"unfinished": board.num_unfinished, "begun": begun, "uncommitted": 0}
        if shards and limits.allow(**counts, looks_ahead=board.wants_more):
            shard = shards.popleft()
            missing[shard[0][0] // SHARD] = SHARD
            board.add_rows(shard, [prompt_bytes([*document(which), n]) for n, which in shard] if by_prompt else None)
            continue
        while (assignment := board.next_assignment()) is not None:
            with_replica[assignment.replica] += assignment.keys
            yield from ((assignment.replica, which) for _, which in assignment.keys)
        name = rng.choice([name for name, mine in with_replica.items() if mine])
        done = with_replica[name].pop(0)
        board.finished(name, done)
        missing -= Counter([done[0] // SHARD])


@pytest.mark.parametrize(("replicas", "most"), [(1, 0.4), (3, 0.25)])
def test_documents_are_computed_less_often_by_an_engine_that_holds_a_twentieth_of_them(
    replicas: int, most: float
) -> None:
    rows = shuffled(200)
    shares = [
        computed_documents(sent_rows(rows, replicas=replicas, by_prompt=by_prompt), num_kept=10) / len(rows)
        for by_prompt in (False, True)
    ]
    assert shares[0] > 0.9  # in the order given nearly each time
    assert shares[1] < most
