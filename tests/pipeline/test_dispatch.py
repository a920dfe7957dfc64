"""The dispatch board, against simulated replicas that die, hang and refuse at random."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dispatch import MAX_MOVED, MAX_SPARED, MICROBATCH, DispatchBoard, GaveUp, suspect_group_size


@dataclass
class Fleet:
    """Simulated replicas around a board: every step sends all there is to send, then lets one replica act."""

    board: DispatchBoard[int]
    killers: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    window: int = 16
    sudden_death: float = 0.0
    names: int = 0
    with_replica: dict[str, list[int]] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    outcomes: dict[int, str] = field(default_factory=dict)
    charged: dict[int, int] = field(default_factory=dict)
    deaths_alone: set[int] = field(default_factory=set)
    num_deaths: int = 0

    def start(self) -> None:
        self.names += 1
        name = f"r-{self.names}"
        self.with_replica[name] = []
        self.board.replica_up(name, window=self.window)

    def settle(self, row: int, outcome: str) -> None:
        assert row not in self.outcomes, f"row {row} came out twice"
        self.outcomes[row] = outcome

    def step(self) -> None:
        while (assignment := self.board.next_assignment()) is not None:
            for row in assignment.keys:
                self.attempts[row] = self.attempts.get(row, 0) + 1
            self.with_replica[assignment.replica].extend(assignment.keys)
            assert len(self.with_replica[assignment.replica]) <= max(self.window, 1_000_000 if self.killers else 0)
        busy = [name for name, rows in self.with_replica.items() if rows]
        if not busy:
            return
        name = self.rng.choice(busy)
        rows = self.with_replica[name]
        if self.killers & set(rows) or self.rng.random() < self.sudden_death:
            self._die(name, rows)
            return
        row = rows.pop(self.rng.randrange(len(rows)))
        if row in self.refused:
            lost = self.board.request_failed(name, row, "request_error")
            if lost is not None:
                self.charged[row] = lost.attempts
                self.settle(row, lost.kind)
        elif self.board.finished(name, row) is not None:
            self.settle(row, "ok")

    def _die(self, name: str, rows: list[int]) -> None:
        self.num_deaths += 1
        if len(rows) == 1:
            self.deaths_alone.add(rows[0])
        del self.with_replica[name]
        for lost in self.board.replica_down(name, "engine_crash"):
            self.charged[lost.key] = lost.attempts
            self.settle(lost.key, lost.kind)
        self.start()

    def run(self, rows: range, replicas: int) -> None:
        for _ in range(replicas):
            self.start()
        self.board.add_rows(rows)
        for _ in range(200_000):
            if self.board.num_unfinished == 0:
                return
            self.step()
        raise AssertionError(f"{self.board.num_unfinished} rows never came out")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(0, 300),
    replicas=st.integers(1, 5),
    num_killers=st.integers(0, 4),
    num_refused=st.integers(0, 4),
    sudden_death=st.sampled_from([0.0, 0.0, 0.02]),
)
def test_every_row_comes_out_once_within_its_attempts_whatever_dies(
    seed: int, num_rows: int, replicas: int, num_killers: int, num_refused: int, sudden_death: float
) -> None:
    rng = random.Random(seed)
    rows = range(num_rows)
    picked = rng.sample(rows, min(num_rows, num_killers + num_refused))
    fleet = Fleet(DispatchBoard(max_attempts=3), set(picked[:num_killers]), set(picked[num_killers:]), rng)
    fleet.sudden_death = sudden_death
    fleet.run(rows, replicas)
    assert sorted(fleet.outcomes) == list(rows)
    if not sudden_death:
        # A refused row may share its last attempt with a killer; that death is not its own, so it is sent once more.
        assert max(fleet.attempts.values(), default=0) <= (4 if num_killers and num_refused else 3)
        assert all(charged <= 3 for charged in fleet.charged.values())
        for row, outcome in fleet.outcomes.items():
            expected = "engine_crash" if row in fleet.killers else "request_error" if row in fleet.refused else "ok"
            assert outcome == expected, (row, outcome)
    for row, outcome in fleet.outcomes.items():
        if outcome == "engine_crash":
            assert row in fleet.deaths_alone, "blamed for a death in company"


def test_a_killer_among_a_full_window_is_found_in_three_deaths_and_few_runs() -> None:
    fleet = Fleet(DispatchBoard(max_attempts=3), killers={517}, window=1024)
    fleet.run(range(1024), replicas=1)
    assert fleet.outcomes[517] == "engine_crash"
    assert sum(outcome == "ok" for outcome in fleet.outcomes.values()) == 1023
    assert fleet.num_deaths == 3
    assert fleet.attempts[517] == 3


def test_groups_shrink_so_that_the_last_attempt_is_alone() -> None:
    assert suspect_group_size(1024, attempts_left=2) == 32
    assert suspect_group_size(1000, attempts_left=3) == 100
    assert suspect_group_size(1000, attempts_left=1) == 1
    assert suspect_group_size(1, attempts_left=2) == 1


def test_a_lost_node_costs_no_attempt() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=1)
    board.replica_up("a-0", window=8)
    board.add_rows(range(4))
    assert board.next_assignment() is not None
    assert board.replica_down("a-0", "engine_crash", rows_to_blame=False) == []
    assert board.num_unfinished == 4
    board.replica_up("a-1", window=8)
    assignment = board.next_assignment()
    assert assignment is not None
    assert sorted(assignment.keys) == [0, 1, 2, 3]


def test_the_least_loaded_replica_gets_the_next_microbatch() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    board.replica_up("slow", window=100)
    board.replica_up("fast", window=100)
    board.add_rows(range(200))
    sent = {"slow": 0, "fast": 0}
    while (assignment := board.next_assignment()) is not None:
        assert len(assignment.keys) <= MICROBATCH
        sent[assignment.replica] += len(assignment.keys)
    assert sent == {"slow": 96, "fast": 96}, "alternating, and no call for the last 4 places"
    assert board.next_assignment() is None, "windows are full"


def test_the_window_is_topped_up_before_it_runs_dry_although_no_shard_is_complete() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    board.replica_up("r", window=16)
    board.add_rows(range(100))
    first = board.next_assignment()
    assert first is not None
    for row in first.keys[1:9]:
        board.finished("r", row)
    again = board.next_assignment()
    assert again is not None
    assert board.num_in_flight("r") == 16


def test_a_failed_request_goes_to_another_replica_if_there_is_one() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    board.replica_up("a", window=4)
    board.replica_up("b", window=4)
    board.add_rows([7])
    first = board.next_assignment()
    assert first is not None
    assert board.request_failed(first.replica, 7, "request_error") is None
    second = board.next_assignment()
    assert second is not None
    assert second.replica != first.replica


def test_a_late_answer_about_a_row_that_moved_on_is_ignored() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    board.replica_up("a", window=4)
    board.add_rows([1])
    assert board.next_assignment() is not None
    board.replica_down("a", "engine_crash")
    assert board.finished("a", 1) is None
    assert board.num_unfinished == 1


def test_work_waits_while_no_replica_is_alive() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    board.add_rows([1, 2])
    assert board.next_assignment() is None
    assert board.num_unfinished == 2


def test_a_single_allowed_attempt_fails_everything_that_was_in_flight() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=1)
    board.replica_up("a", window=4)
    board.add_rows([1, 2])
    board.next_assignment()
    lost = board.replica_down("a", "engine_hang")
    assert {(row.key, row.kind, row.attempts) for row in lost} == {(1, "engine_hang", 1), (2, "engine_hang", 1)}


@pytest.mark.parametrize("keys", [[0, 1, 2], [0]])
def test_discarded_rows_are_never_sent(keys: list[int]) -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    board.add_rows(range(3))
    board.discard(keys)
    board.replica_up("a", window=8)
    assignment = board.next_assignment()
    sent = set(assignment.keys) if assignment else set()
    assert sent == set(range(3)) - set(keys)


def test_a_leaving_replica_finishes_what_it_has_and_gets_nothing_more() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    board.replica_up("a", window=4)
    board.add_rows(range(6))
    first = board.next_assignment()
    assert first is not None
    board.drain("a")
    assert board.finished("a", first.keys[0]) == 1
    assert board.next_assignment() is None
    assert not board.takes_work("a")
    board.replica_up("b", window=4)
    then = board.next_assignment()
    assert then is not None
    assert then.replica == "b"


def test_a_returned_row_goes_next_and_costs_no_attempt() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=1)
    board.replica_up("a", window=4)
    board.add_rows(range(8))
    board.next_assignment()
    board.returned("a", 3)
    board.drain("a")
    board.replica_up("b", window=8)
    then = board.next_assignment()
    assert then is not None
    assert then.keys == (3, 4, 5, 6, 7)
    assert board.finished("b", 3) == 1


def test_a_returned_suspect_is_still_a_suspect() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=2)
    board.replica_up("a", window=4)
    board.add_rows(range(4))
    board.next_assignment()
    board.replica_down("a", "engine_crash")
    board.replica_up("b", window=8)
    group = board.next_assignment()
    assert group is not None
    for key in group.keys:
        board.returned("b", key)
    again = board.next_assignment()
    assert again is not None
    assert len(again.keys) == 1  # never back among the innocent


def test_a_death_in_strangers_company_is_charged_to_a_lone_row_only_when_it_goes_on_and_on() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=2)
    board.add_rows([1])
    deaths = 0
    lost: list[GaveUp[int]] = []
    while not lost:
        board.replica_up(f"r{deaths}", window=4)
        assert board.next_assignment() is not None
        lost = board.replica_down(f"r{deaths}", "engine_crash", in_company=True)
        deaths += 1
    assert [(row.key, row.kind, row.attempts) for row in lost] == [(1, "engine_crash", 2)]
    assert deaths == 1 + MAX_SPARED + 1  # with others of ours, then spared, then charged


def test_a_row_that_takes_its_whole_node_down_each_time_is_given_up_and_its_neighbours_are_not() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    rows, killer, lost, done = range(100), 42, 0, set[int]()
    board.add_rows(rows)
    given_up: list[GaveUp[int]] = []
    while len(done) + len(given_up) < len(rows):
        name = f"node-{lost}"
        board.replica_up(name, window=16)
        sent: list[int] = []
        while (assignment := board.next_assignment()) is not None:
            sent += assignment.keys
        assert sent, "rows are left, and none is sent"
        if killer in sent:
            lost += 1
            given_up += board.replica_down(name, "node_lost", rows_to_blame=False)
            continue
        done |= {row for row in sent if board.finished(name, row) is not None}
        assert board.replica_down(name, "released", rows_to_blame=False) == []
    assert [(lost.key, lost.attempts) for lost in given_up] == [(killer, 3)]
    assert lost <= MAX_MOVED + 3


def test_suspects_go_to_a_replica_that_joins_empty_rather_than_wait_for_one_to_empty() -> None:
    board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
    for name in ("streams", "dies"):
        board.replica_up(name, window=16)
    board.add_rows(range(2))
    first, second = board.next_assignment(), board.next_assignment()
    assert first is not None
    while second is not None:  # what is left may come in several
        second = board.next_assignment()
    holder, other = (first.replica, "dies" if first.replica == "streams" else "streams")
    board.add_rows(range(2, 4))
    while board.next_assignment() is not None:
        pass
    board.replica_down(holder, "engine_crash")  # its rows are suspects; the other one is busy for ever
    assert board.next_assignment() is None
    board.replica_up("replacement", window=16)
    sent = board.next_assignment()
    assert sent is not None
    assert sent.replica == "replacement"
    assert other != "replacement"
