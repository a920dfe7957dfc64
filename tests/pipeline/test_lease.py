from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

from pipeline import lease as lease_module
from pipeline.errors import InfrastructureError, SpecError
from pipeline.lease import FOLDER, acquire_lease, current_owner
from pipeline.storage import Store
from tests.faults.forkserver import aws_environment
from tests.faults.lease_contender import hold, race

RACERS = 16
DEADLINE_S = 60


class Holder:
    """A process that owns an output."""

    def __init__(self, processes: ForkServerContext, root: str, ttl_s: float) -> None:
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(target=hold, args=(aws_environment(), root, ttl_s, theirs))
        self._process.start()
        assert self._answer() == "owner"

    def check(self) -> str:
        self._pipe.send("check")
        return self._answer()

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process.is_alive():
            self.signal(signal.SIGKILL)
        self._process.join(DEADLINE_S)

    def _answer(self) -> str:
        assert self._pipe.poll(DEADLINE_S)
        answer: str = self._pipe.recv()
        return answer


@pytest.fixture
def new_holder(processes: ForkServerContext) -> Iterator[Callable[[str, float], Holder]]:
    holders: list[Holder] = []

    def make(root: str, ttl_s: float) -> Holder:
        holders.append(Holder(processes, root, ttl_s))
        return holders[-1]

    yield make
    for holder in holders:
        holder.kill()


def eventually(claim: Callable[[], bool]) -> bool:
    """Whether the claim comes true before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not (true := claim()) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return true


def seconds(action: Callable[[], object]) -> float:
    begun = time.monotonic()
    action()
    return time.monotonic() - begun


def make_remote(store: Store, *, ttl_s: float, boot: str = "another-boot pid:[1]") -> None:
    """Make the current owner one of another machine, whose process nobody here can look for."""
    owner = current_owner(store)
    assert owner is not None
    record = json.loads(owner.to_bytes())
    record["process"] |= {"process_table": boot, "host": "far-away"}
    store.put(f"{FOLDER}/{owner.epoch:06d}.json", json.dumps(record | {"ttl_s": ttl_s}).encode())


@pytest.mark.usefixtures("atomic_moto")
@pytest.mark.parametrize("before", ["free", "released"])
def test_of_many_processes_exactly_one_becomes_owner(store: Store, processes: ForkServerContext, before: str) -> None:
    if before == "released":
        acquire_lease(store, run_id="earlier").release()
    start, finish, results = processes.Barrier(RACERS), processes.Barrier(RACERS + 1), processes.Queue()
    racers = [
        processes.Process(target=race, args=(aws_environment(), store.root, number, start, finish, results))
        for number in range(RACERS)
    ]
    for racer in racers:
        racer.start()
    told = dict(results.get(timeout=DEADLINE_S) for _ in range(RACERS))
    finish.wait(DEADLINE_S)
    for racer in racers:
        racer.join(DEADLINE_S)
    winners = [number for number, result in told.items() if isinstance(result, int)]
    assert len(winners) == 1, told
    refusals = [result for result in told.values() if isinstance(result, str)]
    assert all(f"run-{winners[0]} " in refusal for refusal in refusals)


def test_refusal_names_run_host_pid_and_since(store: Store, new_holder: Callable[[str, float], Holder]) -> None:
    holder = new_holder(store.root, 2)
    owner = current_owner(store)
    assert owner is not None
    with pytest.raises(SpecError, match=rf"holder.*{owner.process.host}.*pid {owner.process.pid}.*{owner.since[:10]}"):
        acquire_lease(store, run_id="second")
    assert holder.check() == "owner"


def test_killed_owner_on_this_machine_is_replaced_at_once(
    store: Store, new_holder: Callable[[str, float], Holder]
) -> None:
    holder = new_holder(store.root, 600)
    holder.kill()
    waited = seconds(lambda: acquire_lease(store, run_id="next").release())
    assert waited < 10  # ttl is 600 s


def test_released_output_is_taken_at_once(store: Store) -> None:
    with acquire_lease(store, run_id="first", ttl_s=600):
        pass
    assert seconds(lambda: acquire_lease(store, run_id="next").release()) < 10


def test_silent_owner_of_another_machine_is_replaced_after_its_ttl_and_not_before(
    store: Store, new_holder: Callable[[str, float], Holder]
) -> None:
    new_holder(store.root, 600).kill()
    make_remote(store, ttl_s=1.5)
    assert 1.5 <= seconds(lambda: acquire_lease(store, run_id="next").release()) < 15


def test_live_owner_of_another_machine_is_left_alone(store: Store, new_holder: Callable[[str, float], Holder]) -> None:
    holder = new_holder(store.root, 2)
    make_remote(store, ttl_s=2)
    with pytest.raises(SpecError, match="far-away"):
        acquire_lease(store, run_id="second")
    assert holder.check() == "owner"


def test_stopped_owner_that_wakes_is_fenced(store: Store, new_holder: Callable[[str, float], Holder]) -> None:
    holder = new_holder(store.root, 1.5)
    holder.signal(signal.SIGSTOP)
    with acquire_lease(store, run_id="taker") as taken:
        holder.signal(signal.SIGCONT)
        assert "taken over by run taker" in holder.check()
        taken.check()


def test_owner_that_released_may_not_go_on(local: Store) -> None:
    lease = acquire_lease(local, run_id="first")
    lease.check()
    lease.release()
    with pytest.raises(InfrastructureError, match="released"):
        lease.check()


def test_fenced_owner_neither_renews_nor_releases_what_is_not_its_own(local: Store) -> None:
    first = acquire_lease(local, run_id="first", ttl_s=0.6)
    record = json.loads(local.read(f"{FOLDER}/000001.json"))
    local.create(f"{FOLDER}/000002.json", json.dumps(record | {"epoch": 2, "token": "x", "run_id": "thief"}).encode())
    assert eventually(lambda: first._lost is not None)
    first.release()
    assert not local.list(FOLDER).get("000002.beat")
    with pytest.raises(InfrastructureError, match="taken over by run thief"):
        first.check()


def test_renewal_moves_the_counter_without_being_asked(local: Store) -> None:
    with acquire_lease(local, run_id="first", ttl_s=0.3):
        assert eventually(lambda: json.loads(local.read(f"{FOLDER}/000001.beat"))["count"] >= 3)


def test_earlier_epochs_are_cleaned_up_and_the_highest_is_kept(local: Store) -> None:
    for number in range(3):
        acquire_lease(local, run_id=f"run-{number}").release()
    assert set(local.list(FOLDER)) == {"000003.json", "000003.beat"}


def test_challenger_with_an_old_listing_withdraws(local: Store) -> None:
    for number in range(2):
        acquire_lease(local, run_id=f"run-{number}").release()
    with acquire_lease(local, run_id="owner") as owner:
        # It listed when epoch 1 was the latest, and now makes epoch 2, which has been cleaned up since.
        assert lease_module._claim(local, epoch=2, run_id="late", ttl_s=30) is None
        owner.check()


def test_challenger_does_not_watch_an_owner_that_was_replaced_meanwhile(local: Store) -> None:
    acquire_lease(local, run_id="earlier", ttl_s=20).release()
    earlier = current_owner(local)
    assert earlier is not None
    with acquire_lease(local, run_id="winner"):  # cleans up the counter that the challenger is about to read
        assert seconds(lambda: lease_module._is_alive(local, earlier)) < 10


def test_owner_whose_storage_does_not_answer_stops_committing(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = acquire_lease(local, run_id="first", ttl_s=0.2)

    def unreachable(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Store, "put", unreachable)

    def is_refused() -> bool:
        try:
            lease.check()
            return False
        except InfrastructureError as error:
            return "did not answer" in str(error)

    assert eventually(is_refused)
    monkeypatch.undo()
    assert eventually(lambda: not is_refused())  # nobody took over meanwhile, so it goes on
    lease.release()


def test_reused_pid_is_not_taken_for_the_owner(local: Store) -> None:
    lease = acquire_lease(local, run_id="first", ttl_s=600)
    record = json.loads(local.read(f"{FOLDER}/000001.json"))
    record["process"]["started_ticks"] -= 1  # this very pid, but a process that started earlier
    local.put(f"{FOLDER}/000001.json", json.dumps(record).encode())
    assert seconds(lambda: acquire_lease(local, run_id="next").release()) < 10
    lease._renew()
    with pytest.raises(InfrastructureError, match="taken over by run next"):
        lease.check()


def test_unreadable_lease_is_named_with_its_cure(local: Store) -> None:
    local.put(f"{FOLDER}/000001.json", b"{}")
    with pytest.raises(InfrastructureError, match=r"000001\.json is not a lease.*delete _run/lease"):
        acquire_lease(local, run_id="first")


def test_output_that_cannot_be_written_is_a_spec_error(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SpecError, match=r"correct output\.path"):
        acquire_lease(Store(str(tmp_path / "file")), run_id="first")
