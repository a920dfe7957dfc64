"""What a batch is by its files, what is done about it next, and where files lie: no server, no process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import BatchError, BatchRequestCounts

from cluster.batch_files import FileShelf, new_file_id
from cluster.batch_queue import Served
from cluster.batch_records import (
    INPUT,
    LOG,
    RUN,
    SPEC,
    BatchFacts,
    BatchFolder,
    BatchRecords,
    Checked,
    Ended,
    GivenUp,
    Mark,
    new_batch,
)
from cluster.batch_states import describe, next_step, status_of
from jobs.batch_runner import ProcessRunner, keep_spec
from jobs.batch_spec import batch_spec
from jobs.progress import PROGRESS
from jobs.spec import load_spec, parse_spec
from pipeline.settings import ModelSettings

CREATED = new_batch(
    input_file_id="file-1", endpoint="/v1/chat/completions", metadata=None, model="m", ids=("file-2", "file-3")
)
NOW = CREATED.created_at + 60.0
LATE = CREATED.expires_at + 1.0
SOUND = Checked(at=1, num_requests=5)
BROKEN = Checked(at=1, num_requests=5, errors=[BatchError(code="invalid_json_line", line=2, message="no", param=None)])
GIVEN_UP = GivenUp(at=7, errors=[BatchError(code="server_error", message="no")])
COUNTS = BatchRequestCounts(total=5, completed=3, failed=1)


def facts(**known: Any) -> BatchFacts:
    return BatchFacts(CREATED, **known)


def ended(status: Any, **more: Any) -> Ended:
    return Ended(at=9, status=status, counts=COUNTS, **more)


@pytest.mark.parametrize(
    ("known", "status", "step", "step_when_late"),
    [
        ({}, "validating", "check", "end"),
        ({"checked": BROKEN}, "failed", None, None),
        ({"checked": SOUND}, "in_progress", "run", "run"),
        ({"checked": SOUND, "has_run": True}, "in_progress", "run", "run"),
        ({"checked": SOUND, "has_run": True, "finalizing": Mark(at=8)}, "finalizing", "run", "run"),
        ({"cancel": Mark(at=7)}, "cancelling", "end", "end"),
        ({"checked": SOUND, "cancel": Mark(at=7)}, "cancelling", "end", "end"),
        ({"checked": SOUND, "cancel": Mark(at=7), "has_run": True}, "cancelling", "run", "run"),
        ({"given_up": GIVEN_UP}, "finalizing", "end", "end"),
        ({"checked": SOUND, "given_up": GIVEN_UP}, "finalizing", "end", "end"),
        ({"checked": SOUND, "given_up": GIVEN_UP, "has_run": True}, "finalizing", "run", "run"),
        ({"checked": SOUND, "given_up": GIVEN_UP, "has_run": True, "ended": ended("failed")}, "failed", None, None),
        ({"checked": SOUND, "has_run": True, "ended": ended("completed")}, "completed", None, None),
        ({"checked": SOUND, "cancel": Mark(at=7), "ended": ended("cancelled")}, "cancelled", None, None),
        ({"checked": SOUND, "ended": ended("expired")}, "expired", None, None),
    ],
)
def test_state_and_next_step_follow_from_what_is_known(
    known: dict[str, Any], status: str, step: str | None, step_when_late: str | None
) -> None:
    known_facts = facts(**known)
    assert status_of(known_facts) == describe(known_facts, None).status == status
    assert next_step(known_facts, NOW) == step
    assert next_step(known_facts, LATE) == step_when_late


def test_counts_are_live_while_it_runs_and_final_when_it_is_over() -> None:
    live = BatchRequestCounts(total=5, completed=1, failed=0)
    assert describe(facts(), None).request_counts == BatchRequestCounts(total=0, completed=0, failed=0)
    assert describe(facts(checked=SOUND), None).request_counts == BatchRequestCounts(total=5, completed=0, failed=0)
    assert describe(facts(checked=SOUND), live).request_counts == live
    assert describe(facts(checked=SOUND, ended=ended("completed")), live).request_counts == COUNTS


def test_files_are_named_once_they_are_there_and_times_have_openais_names() -> None:
    running = describe(facts(checked=SOUND, finalizing=Mark(at=8)), None)
    assert (running.output_file_id, running.error_file_id) == (None, None)
    assert (running.in_progress_at, running.finalizing_at, running.completed_at) == (1, 8, None)
    done = describe(facts(checked=SOUND, ended=ended("expired", has_output=True)), None)
    assert (done.output_file_id, done.error_file_id) == ("file-2", None)
    assert (done.expired_at, done.completed_at, done.cancelled_at, done.failed_at) == (9, None, None, None)
    broken = describe(facts(checked=BROKEN), None)
    assert (broken.failed_at, broken.in_progress_at) == (1, None)
    assert broken.errors is not None
    assert broken.errors.data == BROKEN.errors
    assert done.expires_at == done.created_at + 86400


def test_a_folder_tells_what_was_noted_in_it_and_its_rows_go_with_its_end(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    records = BatchRecords(tmp_path)
    folder = records.create("alice", source, CREATED)
    source.unlink()
    assert (folder.path / INPUT).read_text() == "{}\n", "whatever becomes of the file"
    assert folder.facts() == facts()
    folder.note_checked(5, [])
    folder.note_cancel()
    first = folder.facts().cancel
    folder.note_cancel()
    (folder.path / RUN / "data").mkdir(parents=True)
    (folder.path / RUN / "data" / "part.parquet").write_text("rows")
    noted = folder.facts()
    assert (noted.cancel, noted.has_run, noted.checked and noted.checked.num_requests) == (first, True, 5)
    folder.note_ended(ended("cancelled"))
    assert folder.facts().ended == ended("cancelled")
    assert not (folder.path / INPUT).exists()
    assert not (folder.path / RUN / "data").exists()
    assert [each.path for each in records.everybodys()] == [folder.path]
    assert (folder.owner, folder.root) == ("alice", tmp_path)


@pytest.mark.parametrize("evil", ["../of-bob/file-" + "0" * 32, "file-", "", "/etc/passwd", "file-" + "0" * 31 + "/"])
def test_no_id_leads_out_of_its_owners_folder(evil: str, tmp_path: Path) -> None:
    shelf, records = FileShelf(tmp_path), BatchRecords(tmp_path)
    shelf.add("bob", io.BytesIO(b"secret"), name="x", purpose="batch", file_id="file-" + "0" * 32)
    assert shelf.find("alice", evil) is None
    assert not shelf.delete("alice", evil)
    assert records.find("alice", evil) is None
    with pytest.raises(ValueError, match="no id of a file"):
        shelf.content_path("alice", evil)
    for owner in ("../bob", "a/b", ""):
        with pytest.raises(ValueError, match="no name of a key"):
            shelf.listed(owner)
    assert shelf.find("bob", "file-" + "0" * 32) is not None


def test_a_key_named_like_a_folder_above_stays_below(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path / "root")
    for owner in (".", ".."):
        shelf.add(owner, io.BytesIO(b"x"), name="x", purpose="batch", file_id=new_file_id())
        assert len(shelf.listed(owner)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_file_without_its_record_is_not_there_and_comes_again_under_its_id(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    file_id = new_file_id()
    shelf.add("a", io.BytesIO(b"1"), name="x", purpose="batch_output", file_id=file_id)
    shelf.content_path("a", file_id).with_suffix(".json").unlink()
    assert shelf.find("a", file_id) is None
    assert shelf.listed("a") == []
    again = shelf.add("a", io.BytesIO(b"22"), name="x", purpose="batch_output", file_id=file_id)
    assert FileShelf(tmp_path).listed("a") == [again]
    assert again.bytes == 2


def served(**changes: Any) -> Served:
    given = {
        "fleet": "warm",
        "address": "127.0.0.1:1",
        "model_name": "m",
        "model": ModelSettings(source="tiny", dtype="float32", max_model_len=512),
        "captures_routing": True,
        "marker_text": "reject",
        "request_timeout_s": 100.0,
        "drain_timeout_s": 5.0,
    }
    return Served(**{**given, **changes})


@pytest.mark.parametrize(("endpoint", "max_tokens"), [("/v1/chat/completions", 512), ("/v1/completions", 16)])
def test_its_run_is_an_ordinary_spec_with_the_endpoints_own_settings(endpoint: str, max_tokens: int) -> None:
    created = CREATED.model_copy(update={"endpoint": endpoint})
    spec = parse_spec(json.dumps(batch_spec(created, Path("/b"), served(captures_routing=False))), name="job.yaml")
    assert spec.model == served().model
    assert (spec.input.path, spec.input.format, spec.output.path) == ("/b/input.jsonl", "openai_batch", "/b/run")
    assert (spec.fleet.attach, spec.routing.level, spec.prompt.marker_text) == ("warm", "off", "reject")
    assert (spec.sampling.max_tokens, spec.sampling.fit) == (max_tokens, True)
    assert (spec.limits.request_timeout_s, spec.limits.drain_timeout_s) == (100, 5)


def test_a_batch_begun_keeps_its_spec_whatever_a_later_endpoint_would_write(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    folder = BatchRecords(tmp_path).create("alice", source, CREATED)
    keep_spec(folder, served())
    first = (folder.path / SPEC).read_bytes()
    keep_spec(folder, served(marker_text="escape", captures_routing=False, fleet="other"))
    assert (folder.path / SPEC).read_bytes() == first
    assert load_spec(folder.path / SPEC, ['fleet.attach="other"']).fleet.attach == "other", "where it runs may change"


def test_last_words_are_the_last_lines_of_the_log(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path)
    assert folder.last_words() == ""
    (tmp_path / LOG).write_bytes(b"x" * 100_000 + b"\n\xff\n" + b"\n".join(b"line %d" % n for n in range(9)) + b"\n \n")
    assert folder.last_words() == "\n".join(f"line {n}" for n in range(4, 9))
    (tmp_path / LOG).write_bytes(b"y" * 100_000)
    assert folder.last_words() == "y" * 1000


def test_live_counts_come_from_the_runs_progress(tmp_path: Path) -> None:
    runner = ProcessRunner()
    assert runner.counts(tmp_path) is None
    path = tmp_path / RUN / PROGRESS
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows_total": 9, "rows_done": 5, "rows_failed": 2}))
    assert runner.counts(tmp_path) == BatchRequestCounts(total=9, completed=3, failed=2)
    assert BatchFolder(tmp_path / "batches" / "of-a" / "b").root == tmp_path
