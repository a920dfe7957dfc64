"""Which batches are worked at when: by a clock and processes that a test moves on."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai.types import BatchError, BatchRequestCounts

from cluster.batch_queue import MAX_FAILURES, BatchQueue, Served
from cluster.batch_records import (
    INPUT,
    LOG,
    RECORD,
    RESULTS,
    RUN,
    BatchFolder,
    BatchRecords,
    End,
    Ended,
    new_batch,
)
from cluster.batch_states import NO_COUNTS, Step, end_of, is_to_end, status_of
from pipeline.parts import DATA
from tests.cluster.test_batch_states import served


class Process:
    """Ends when the test says so."""

    def __init__(self, step: Step, folder: BatchFolder) -> None:
        self.step, self.folder = step, folder
        self.exit_code: int | None = None
        self.signals: list[str] = []

    def poll(self) -> int | None:
        return self.exit_code

    def terminate(self) -> None:
        self.signals.append("TERM")

    def kill(self) -> None:
        self.signals.append("KILL")

    def end(self, exit_code: int = 0) -> None:
        """As `jobs.batch_process`: notes what it has done if it got to its end."""
        if exit_code == 0 and self.step == "check":
            self.folder.note_checked(3, [])
        elif exit_code == 0:
            facts = self.folder.facts()
            status: End = end_of(facts) if is_to_end(facts, 0) else "completed"
            errors = facts.given_up.errors if facts.given_up else []
            self.folder.note_ended(Ended(at=1, status=status, counts=NO_COUNTS, errors=errors))
        self.exit_code = exit_code


class Runner:
    """Notes what it is told to start."""

    def __init__(self) -> None:
        self.started: list[Process] = []

    def start(self, step: Step, folder: Path, served: Served) -> Process:
        if step == "run":
            (folder / RUN).mkdir(exist_ok=True)
        self.started.append(Process(step, BatchFolder(folder)))
        return self.started[-1]

    def counts(self, folder: Path) -> BatchRequestCounts | None:
        return None

    def live(self, step: Step) -> list[str]:
        return [p.folder.path.name for p in self.started if p.step == step and p.exit_code is None]

    def of(self, folder: BatchFolder, step: Step) -> list[Process]:
        return [p for p in self.started if p.folder.path == folder.path and p.step == step]


@dataclasses.dataclass
class Desk:
    """A queue with a clock of the test's own."""

    root: Path
    at_once: int = 1
    time: float = 0.0

    def __post_init__(self) -> None:
        self.runner, self.records = Runner(), BatchRecords(self.root)
        self._numbers = itertools.count()
        self.queue = self.open()

    def open(self) -> BatchQueue:
        return BatchQueue(BatchRecords(self.root), self.runner, served(), at_once=self.at_once, now=lambda: self.time)

    def create(self, owner: str = "alice") -> BatchFolder:
        folder = self.make(owner)
        self.queue.add(folder)
        return folder

    def make(self, owner: str = "alice", *, model: str = "m") -> BatchFolder:
        """One that the queue isn't told of."""
        source = self.root / "in.jsonl"
        source.write_text("{}\n")
        created = new_batch(
            input_file_id="f", endpoint="/v1/completions", metadata=None, model=model, ids=("file-a", "file-b")
        )
        created = created.model_copy(update={"created_ns": next(self._numbers), "expires_at": 1000})
        return self.records.create(owner, source, created)

    def look(self) -> None:
        """Until nothing more comes of looking: one look sees an end, the next begins what follows from it."""
        for _ in range(3):
            self.queue.look()

    def check_all(self) -> None:
        while self.runner.live("check"):
            next(p for p in self.runner.started if p.step == "check" and p.exit_code is None).end()
            self.look()

    def status(self, folder: BatchFolder) -> str:
        return str(status_of(folder.facts()))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    return Desk(tmp_path)  # type: ignore[return-value]


def test_files_are_checked_at_once_and_runs_wait_in_order(desk: Desk) -> None:
    first, second, third = desk.create(), desk.create("bob"), desk.create()
    desk.look()
    desk.check_all()
    assert [desk.status(batch) for batch in (first, second, third)] == ["in_progress"] * 3
    assert desk.runner.live("run") == [first.path.name]
    desk.runner.of(first, "run")[0].end()
    desk.look()
    assert desk.runner.live("run") == [second.path.name]
    desk.runner.of(second, "run")[0].end()
    desk.look()
    desk.runner.of(third, "run")[0].end()
    desk.look()
    assert [desk.queue.num_open(owner) for owner in ("alice", "bob")] == [0, 0]
    assert len(desk.runner.started) == 6


def test_no_more_run_at_once_than_are_allowed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, at_once=2)
    batches = [desk.create() for _ in range(4)]
    desk.look()
    desk.check_all()
    assert desk.runner.live("run") == [batch.path.name for batch in batches[:2]]


def test_a_file_with_errors_is_over_without_a_run(desk: Desk) -> None:
    batch = desk.create()
    desk.look()
    [check] = desk.runner.started
    batch.note_checked(1, [BatchError(code="x")])
    check.exit_code = 0
    desk.look()
    assert desk.status(batch) == "failed"
    assert len(desk.runner.started) == 1
    assert desk.queue.num_open("alice") == 0


def test_a_waiting_batch_is_cancelled_at_once_and_a_running_one_gets_to_write_its_results(desk: Desk) -> None:
    running, waiting = desk.create(), desk.create()
    desk.look()
    desk.check_all()
    for batch in (running, waiting):
        batch.note_cancel()
    desk.look()
    assert (desk.status(running), desk.status(waiting)) == ("cancelling", "cancelled")
    [run] = desk.runner.of(running, "run")
    assert run.signals == ["TERM"]
    run.end(-15)  # it was only just starting
    desk.look()
    again = desk.runner.of(running, "run")[1]
    assert again.signals == [], "it would never come to an end"
    again.end()
    desk.look()
    assert desk.status(running) == "cancelled"


def test_what_ignores_the_order_to_end_is_killed(desk: Desk) -> None:
    batch = desk.create()
    desk.look()
    desk.check_all()
    batch.note_cancel()
    desk.look()
    desk.time = 200.0
    desk.look()
    assert desk.runner.of(batch, "run")[0].signals[:2] == ["TERM", "KILL"]


def test_a_batch_ends_with_its_window(desk: Desk) -> None:
    running, waiting = desk.create(), desk.create()
    desk.look()
    desk.check_all()
    unchecked = desk.create()
    desk.time = 1001.0
    desk.look()
    assert desk.runner.of(running, "run")[0].signals == ["TERM"]
    assert desk.status(unchecked) == "expired"
    assert desk.status(waiting) == "in_progress", "its process has to say which requests expired"


def test_a_failing_batch_lets_others_pass_and_is_failed_in_the_end(desk: Desk) -> None:
    failing, other = desk.create(), desk.create()
    desk.look()
    desk.check_all()
    desk.runner.of(failing, "run")[0].end(3)
    desk.look()
    assert desk.runner.live("run") == [other.path.name]
    desk.runner.of(other, "run")[0].end()
    (failing.path / LOG).write_text("Traceback\nerror: changed since then: prompt.marker_text\n")
    fail(desk, failing, MAX_FAILURES - 1)
    assert desk.status(failing) == "finalizing"
    assert (failing.path / INPUT).exists(), "nothing goes before its results are written"
    desk.look()
    writing = desk.runner.of(failing, "run")[MAX_FAILURES]
    assert writing.signals == []
    writing.end()
    desk.look()
    assert desk.status(failing) == "failed"
    [error] = ended(failing).errors
    assert error.code == "server_error"
    assert "changed since then: prompt.marker_text" in str(error.message)
    assert desk.queue.num_open("alice") == 0


def test_results_that_cannot_be_written_stay_in_the_folder_of_a_failed_batch(desk: Desk) -> None:
    failing = desk.create()
    desk.look()
    desk.check_all()
    fail(desk, failing, 2 * MAX_FAILURES)
    assert desk.status(failing) == "failed"
    assert len(ended(failing).errors) == 2
    desk.open()
    assert (failing.path / INPUT).exists(), "the next endpoint leaves them alone, too"


def test_what_cannot_even_be_checked_is_failed_without_a_run(desk: Desk) -> None:
    failing = desk.create()
    fail(desk, failing, MAX_FAILURES, "check")
    desk.look()
    assert desk.status(failing) == "failed"
    assert [error.code for error in ended(failing).errors] == ["server_error"]
    assert desk.runner.of(failing, "run") == []


def test_folders_that_are_gone_or_broken_keep_no_other_batch_waiting(desk: Desk) -> None:
    running, gone, broken, strange, sound = (desk.create() for _ in range(5))
    desk.look()
    desk.check_all()
    assert desk.runner.live("run") == [running.path.name]
    for folder in (running, gone):
        shutil.rmtree(folder.path)
    (broken.path / RECORD).write_text("{")
    (strange.path / "cancel.json").write_text('{"at": "yesterday"}')
    desk.look()
    [run] = desk.runner.of(running, "run")
    assert run.signals[0] == "TERM"
    run.exit_code = -15
    desk.look()
    assert desk.runner.live("run") == [sound.path.name]
    desk.runner = Runner()
    desk.queue = desk.open()
    desk.look()
    assert desk.runner.live("run") == [sound.path.name]
    assert [folder.path for folder in desk.records.owned("alice")] == [sound.path, strange.path]
    (strange.path / "cancel.json").unlink()
    desk.runner.of(sound, "run")[0].end()
    desk.time += 61
    desk.look()
    assert desk.runner.live("run") == [strange.path.name], "one that is mended goes on"


def test_batches_that_another_endpoint_made_are_found_in_a_minute_and_those_of_another_model_left(desk: Desk) -> None:
    own = desk.create()
    others, strangers = desk.make(), desk.make(model="another")
    later = desk.create()
    desk.look()
    desk.check_all()
    assert desk.queue.num_open("alice") == 2
    desk.time += 61
    desk.look()
    desk.check_all()
    assert desk.queue.num_open("alice") == 3
    assert [desk.status(batch) for batch in (others, strangers, later)] == ["in_progress", "validating", "in_progress"]
    desk.runner.of(own, "run")[0].end()
    desk.look()
    assert desk.runner.live("run") == [others.path.name], "it was created before the other one"


def test_an_endpoint_for_another_model_leaves_what_waits_alone_until_its_time_is_over(desk: Desk) -> None:
    """At its start too: the waiting batch would be answered by a model that nobody asked."""
    strangers, cancelled = desk.make(model="another"), desk.make(model="another")
    cancelled.note_cancel()
    desk.runner, desk.queue = Runner(), desk.open()
    desk.look()
    assert desk.runner.started == []
    assert [desk.status(each) for each in (strangers, cancelled)] == ["validating", "cancelled"]
    desk.time = 1000
    desk.look()
    desk.look()
    assert desk.runner.started == []
    assert desk.status(strangers) == "expired"


def test_prompts_that_an_endpoint_died_before_removing_go_when_the_next_one_opens(desk: Desk) -> None:
    done, refused, waiting = desk.create(), desk.create(), desk.create()
    done.note_ended(Ended(at=1, status="completed", counts=NO_COUNTS))
    refused.note_checked(1, [BatchError(code="x")])
    for folder in (done, refused):
        for name in (INPUT, f"{RUN}/{DATA}/part.parquet", f"{RESULTS}/output.jsonl"):
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / name).write_text("a prompt")
    desk.open()
    left = {path.name for folder in (done, refused) for path in folder.path.rglob("*") if path.is_file()}
    assert left == {"batch.json", "ended.json", "checked.json"}
    assert (waiting.path / INPUT).exists()


def test_a_queue_that_works_no_more_says_so(desk: Desk) -> None:
    class Broken(Runner):
        def start(self, step: Step, folder: Path, served: Served) -> Process:
            raise RuntimeError("a mistake of ours")

    async def work() -> None:
        with pytest.raises(RuntimeError):
            await desk.queue.begin()

    desk.queue.runner = Broken()
    desk.create()
    asyncio.run(work())
    assert "a mistake of ours" in str(desk.queue.failure)


def fail(desk: Desk, batch: BatchFolder, times: int, step: Step = "run") -> None:
    for _ in range(times):
        desk.time += 61
        desk.look()
        desk.runner.of(batch, step)[-1].end(3)
        desk.queue.look()


def ended(batch: BatchFolder) -> Ended:
    found = batch.facts().ended
    assert found is not None
    return found


def test_a_new_queue_goes_on_with_what_is_open(desk: Desk) -> None:
    done, begun, fresh = desk.create(), desk.create(), desk.create()
    desk.look()
    desk.check_all()
    desk.runner.of(done, "run")[0].end()
    desk.look()
    assert desk.runner.live("run") == [begun.path.name]
    desk.runner = Runner()
    desk.queue = desk.open()
    desk.look()
    assert desk.runner.live("run") == [begun.path.name]
    assert desk.queue.num_open("alice") == 2
    desk.runner.of(begun, "run")[0].end()
    desk.look()
    assert desk.runner.live("run") == [fresh.path.name]


async def _closed(desk: Desk) -> None:
    await desk.queue.close()


def test_an_endpoint_that_ends_stops_its_runs_and_starts_none(desk: Desk) -> None:
    import threading

    running, waiting = desk.create(), desk.create()
    desk.look()
    desk.check_all()
    [run] = desk.runner.of(running, "run")
    closing = threading.Thread(target=lambda: asyncio.run(_closed(desk)))
    closing.start()
    while not run.signals:
        closing.join(0.01)
    run.end(130)
    closing.join(10)
    assert not closing.is_alive()
    assert run.signals == ["TERM"]
    assert desk.runner.of(waiting, "run") == []
    assert desk.status(running) == "in_progress"
