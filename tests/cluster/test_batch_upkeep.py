"""What files and batches take, what goes by itself, and callers who hang up: folders and handlers, no server."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import Request
from starlette.datastructures import UploadFile

from cluster import batch_upkeep
from cluster.batch_files import FileShelf, new_file_id
from cluster.batch_queue import BatchQueue
from cluster.batch_records import INPUT, RUN, BatchFolder, BatchRecords, Created, new_batch
from cluster.batch_upkeep import drop_oldest, num_bytes, sweep
from cluster.serve_batches import BatchDesk, _Routes, open_desk
from cluster.serve_errors import ApiError
from cluster.serve_http import CALLER
from cluster.serve_settings import ServeSettings
from cluster.serve_types import BatchRequest
from tests.cluster.test_batch_queue import Runner
from tests.cluster.test_batch_states import served
from tests.driver_processes import wait_until

BLOCK = 4096


def created() -> Created:
    return new_batch(input_file_id="f", endpoint="/v1/completions", metadata=None, model="m", ids=("a", "b"))


def upload(root: Path, content: bytes = b"{}\n", owner: str = "alice") -> Path:
    shelf, file_id = FileShelf(root), new_file_id()
    shelf.add(owner, io.BytesIO(content), name="x", purpose="batch", file_id=file_id)
    return shelf.content_path(owner, file_id)


def desk_of(root: Path, records: Callable[[Path], BatchRecords] = BatchRecords, **settings: int) -> BatchDesk:
    def queue(_: BatchRecords) -> BatchQueue:
        return BatchQueue(records(root), Runner(), served(), at_once=1)

    desk = open_desk(root, queue, ServeSettings(**settings))  # type: ignore[arg-type]
    return BatchDesk(desk.root, desk.files, desk.queue.records, desk.queue, desk.settings)


def asked_for(path: Path) -> tuple[BatchRequest, Request]:
    body = {"input_file_id": path.stem, "endpoint": "/v1/completions", "completion_window": "24h"}
    return BatchRequest.model_validate(body), Request({"type": "http", CALLER: "alice"})


def test_what_a_key_takes_is_its_files_and_all_of_its_batches_and_shared_bytes_once(tmp_path: Path) -> None:
    path = upload(tmp_path, b"x" * 3 * BLOCK)
    upload(tmp_path, b"another's", owner="bob")
    assert num_bytes(tmp_path, "alice") == 4 * BLOCK, "three of its bytes, one of its record"
    folder = BatchRecords(tmp_path).create("alice", path, created())
    assert num_bytes(tmp_path, "alice") == 5 * BLOCK
    (folder.path / RUN / "data").mkdir(parents=True)
    (folder.path / RUN / "data" / "part.parquet").write_bytes(b"y" * 2 * BLOCK)
    FileShelf(tmp_path).delete("alice", path.stem)
    assert num_bytes(tmp_path, "alice") == 6 * BLOCK, "a batch's requests stay when their file goes"


def test_what_dead_writers_left_goes_and_what_may_still_be_written_stays(tmp_path: Path) -> None:
    path = upload(tmp_path)
    sound = BatchRecords(tmp_path).create("alice", path, created())
    left: list[list[Path]] = [[], []]
    for paths in left:
        torn, half = upload(tmp_path), BatchRecords(tmp_path).create("alice", path, created())
        torn.with_suffix(".json").unlink()
        (half.path / "batch.json").unlink()
        temporary = path.with_name(f".x.{os.urandom(16).hex()}.tmp")
        temporary.write_text("a prompt")
        paths += [torn, half.path, temporary]
    for each in left[0]:
        os.utime(each, (1, 1))
    os.utime(path, (1, 1))
    os.utime(sound.path, (1, 1))
    sweep(tmp_path)
    assert [each.exists() for each in left[0]] == [False] * 3
    assert [each.exists() for each in left[1]] == [True] * 3
    assert path.exists()
    assert (sound.path / INPUT).exists()


def test_of_very_many_batches_that_are_over_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_upkeep, "MAX_OVER", 2)
    records, path = BatchRecords(tmp_path), upload(tmp_path)
    alices = [records.create("alice", path, created()) for _ in range(4)]
    bobs = [records.create("bob", path, created()) for _ in range(2)]
    drop_oldest(records.everybodys())
    assert [folder.path.exists() for folder in (*alices, *bobs)] == [False, False, True, True, True, True]
    assert path.exists()


class _Slow(BatchRecords):
    """Creating takes until the test says so."""

    began, may_end = threading.Event(), threading.Event()

    def create(self, owner: str, input_path: Path, created: Created) -> BatchFolder:
        self.began.set()
        assert self.may_end.wait(10)
        return super().create(owner, input_path, created)


def test_a_batch_whose_creator_hangs_up_is_queued_nonetheless(tmp_path: Path) -> None:
    desk = desk_of(tmp_path, _Slow)
    body, request = asked_for(upload(tmp_path))

    async def hang_up() -> None:
        creating = asyncio.create_task(_Routes(desk).create(body, request))
        await asyncio.to_thread(_Slow.began.wait, 10)
        creating.cancel()
        _Slow.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await creating

    asyncio.run(hang_up())
    wait_until(lambda: desk.queue.num_open("alice") == 1, "it is queued")
    assert len(desk.records.owned("alice")) == 1


def test_a_key_whose_batches_take_too_much_uploads_and_creates_no_more(tmp_path: Path) -> None:
    desk = desk_of(tmp_path, max_stored_bytes=4 * BLOCK)
    path = upload(tmp_path)
    folder = desk.records.create("alice", path, created())
    (folder.path / RUN).mkdir()
    (folder.path / RUN / "part.parquet").write_bytes(b"y" * 4 * BLOCK)
    body, request = asked_for(path)
    with pytest.raises(ApiError, match="files and batches would take more"):
        asyncio.run(_Routes(desk).create(body, request))
    with pytest.raises(ApiError, match="files and batches would take more"):
        _Routes(desk)._keep("alice", UploadFile(io.BytesIO(b"x"), size=1))
    assert desk.records.owned("alice") == [folder]
