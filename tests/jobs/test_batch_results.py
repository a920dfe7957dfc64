"""From runs to the files of batches: whole ones, cut ones, and ones that were being written when a process died."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from openai.types import BatchError, BatchRequestCounts

from cluster.batch_files import FileShelf, new_file_id
from cluster.batch_records import INPUT, RUN, BatchFolder, BatchRecords, Ended, new_batch
from jobs.batch_check import MAX_ERRORS, check_requests
from jobs.batch_process import answer
from jobs.batch_results import finish
from jobs.batch_runner import MODULE
from jobs.batch_spec import batch_spec
from jobs.prepare import prepare
from jobs.spec import parse_spec
from tests.cluster.test_batch_states import served
from tests.driver_processes import REPOSITORY, wait_until
from tests.jobs.test_openai_export import chat_line, parse, raw_line, write_lines
from tests.whole_runs import run_scripted


def make_batch(root: Path, lines: list[Any]) -> BatchFolder:
    ids = (new_file_id(), new_file_id())
    created = new_batch(
        input_file_id=new_file_id(), endpoint="/v1/chat/completions", metadata=None, model="gpt-4o-mini", ids=ids
    )
    return BatchRecords(root).create("alice", write_lines(root / "in.jsonl", lines), created)


def run_batch(batch: BatchFolder) -> None:
    spec = batch_spec(batch.facts().created, batch.path, served())
    del spec["fleet"]
    assert run_scripted(prepare(parse_spec(json.dumps(spec), name="job.yaml")))["exit_code"] == 0


def read(batch: BatchFolder, file_id: str) -> list[dict[str, Any]]:
    path = FileShelf(batch.root).content_path(batch.owner, file_id)
    return [json.loads(line) for line in path.read_text().splitlines()]


def ended(batch: BatchFolder) -> Ended:
    found = batch.facts().ended
    assert found is not None
    return found


def test_what_was_not_answered_in_time_is_an_error_of_its_own(local_ray: None, tmp_path: Path) -> None:
    lines = [chat_line(f"r{n}", f"question {n}", temperature=0) for n in range(150)]
    lines[0]["body"]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    batch = make_batch(tmp_path, lines)
    batch.note_checked(150, [])
    run_batch(batch)
    parts = sorted((batch.path / RUN / "data").iterdir())
    assert len(parts) == 3
    parts[1].unlink()
    finish(batch, now=5)
    created = batch.facts().created
    assert ended(batch).status == "expired"
    results, errors = read(batch, created.output_file_id), read(batch, created.error_file_id)
    assert ended(batch).counts == BatchRequestCounts(total=150, completed=len(results), failed=len(errors))
    assert {line["custom_id"] for line in (*results, *errors)} == {f"r{n}" for n in range(150)}
    assert {parse(line).code for line in errors} == {"unsupported_parameter", "batch_expired"}  # type: ignore[union-attr]
    assert [line["custom_id"] for line in errors if line["response"] is not None] == ["r0"]
    assert {line["error"]["code"] for line in errors if line["response"] is None} == {"batch_expired"}
    assert not (batch.path / INPUT).exists()


def test_a_batch_that_expired_before_its_run_began_has_an_error_for_every_request(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, [chat_line("a"), "", chat_line("b")])
    batch.note_checked(2, [])
    finish(batch, now=5)
    created = batch.facts().created
    assert ended(batch) == Ended(
        at=5,
        status="expired",
        counts=BatchRequestCounts(total=2, completed=0, failed=2),
        has_error_file=True,
    )
    assert [line["custom_id"] for line in read(batch, created.error_file_id)] == ["a", "b"]
    assert FileShelf(tmp_path).find("alice", created.output_file_id) is None


def test_a_batch_that_is_given_up_keeps_what_was_answered(local_ray: None, tmp_path: Path) -> None:
    batch = make_batch(tmp_path, [chat_line(f"r{n}", f"question {n}", temperature=0) for n in range(150)])
    batch.note_checked(150, [])
    run_batch(batch)
    parts = sorted((batch.path / RUN / "data").iterdir())
    parts[1].unlink()
    why = BatchError(code="server_error", message="another model")
    batch.note_given_up([why])
    answer(batch, "no cluster is asked for anything", "no fleet")
    results = read(batch, batch.facts().created.output_file_id)
    assert 0 < len(results) < 150
    found = ended(batch)
    assert (found.status, found.errors, found.has_output, found.has_error_file) == ("failed", [why], True, False)
    assert found.counts == BatchRequestCounts(total=150, completed=len(results), failed=0)
    assert not (batch.path / INPUT).exists()


def test_a_cancelled_batch_tells_nothing_of_what_was_not_begun(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, [chat_line("a")])
    batch.note_checked(1, [])
    batch.note_cancel()
    answer(batch, "no cluster is asked for anything", "no fleet")
    assert ended(batch).status == "cancelled"
    assert (ended(batch).has_output, ended(batch).has_error_file) == (False, False)
    assert FileShelf(tmp_path).listed("alice") == []


def test_results_that_were_being_written_are_written_anew_under_the_same_ids(local_ray: None, tmp_path: Path) -> None:
    batch = make_batch(tmp_path, [chat_line("a", temperature=0), chat_line("b", temperature=0)])
    batch.note_checked(2, [])
    run_batch(batch)
    created = batch.facts().created
    FileShelf(tmp_path).content_path("alice", created.output_file_id).parent.mkdir(parents=True)
    FileShelf(tmp_path).content_path("alice", created.output_file_id).write_text("torn")
    (batch.path / "results").mkdir()
    (batch.path / "results" / "error.jsonl").write_text("left behind\n")
    finish(batch, now=5)
    assert ended(batch).status == "completed"
    assert [line["custom_id"] for line in read(batch, created.output_file_id)] == ["a", "b"]
    [file] = FileShelf(tmp_path).listed("alice")
    assert (file.id, file.purpose) == (created.output_file_id, "batch_output")
    usage = ended(batch).usage
    assert usage is not None
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 0


def test_a_file_is_read_to_its_first_hundred_errors(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", ["{"] * 150)
    num_requests, errors = check_requests(str(path), endpoint="/v1/completions", model="m")
    assert (num_requests, len(errors)) == (MAX_ERRORS, MAX_ERRORS)
    good = write_lines(tmp_path / "good.jsonl", [raw_line("a", prompt="x"), raw_line("b", prompt="x", tools=[1])])
    assert check_requests(str(good), endpoint="/v1/completions", model="m") == (2, [])
    blank = write_lines(tmp_path / "blank.jsonl", ["", " "])
    num_requests, [error] = check_requests(str(blank), endpoint="/v1/completions", model="m")
    assert (num_requests, error.code, error.line) == (0, "empty_file", None)


def test_of_several_processes_for_one_batch_one_works_at_a_time(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, [chat_line("a")])
    with (batch.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start_check(batch, os.getpid())
        wait_until(lambda: waits_for_lock(process.pid), "it waits")
        batch.note_ended(Ended(at=7, status="cancelled", counts=BatchRequestCounts(total=0, completed=0, failed=0)))
    assert process.wait(60) == 0
    assert batch.facts().checked is None, "it found the batch over"


def test_a_batchs_process_does_not_outlive_the_one_that_started_it(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, [chat_line("a")])
    with (batch.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = str(command(batch, "PARENT")).replace("'PARENT'", "str(os.getpid())")
        code = f"import os, subprocess; child = subprocess.Popen({words}); print(child.pid, flush=True); child.wait()"
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(lambda: waits_for_lock(child), "it waits")
        parent.kill()
        parent.wait()
        wait_until(lambda: has_ended(child), "it has ended", deadline_s=10)
    assert batch.facts().checked is None
    late = start_check(batch, parent.pid)
    assert late.wait(60) == 130, "whoever should have been its parent is gone"


def command(batch: BatchFolder, parent: str) -> list[str]:
    return [sys.executable, "-m", MODULE, "check", str(batch.path), "no cluster", "no fleet", parent]


def start_check(batch: BatchFolder, parent: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(batch, str(parent)), cwd=REPOSITORY)


def waits_for_lock(pid: int) -> bool:
    """Whether the kernel has it in its list of those that wait for a lock."""
    return any("->" in line and line.split()[5] == str(pid) for line in Path("/proc/locks").read_text().splitlines())


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
