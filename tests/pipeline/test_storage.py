from __future__ import annotations

import contextlib
import errno
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pytest

from pipeline import local_objects
from pipeline.errors import SpecError
from pipeline.storage import Store, split_url


@pytest.fixture
def s3_store(s3_bucket: str) -> Store:
    return Store(f"s3://{s3_bucket}/out")


def test_object_put_is_read_back_listed_and_replaced(store: Store) -> None:
    store.put("data/a", b"one")
    store.put("data/a", b"three")
    assert store.read("data/a") == b"three"
    assert store.size("data/a") == 5
    assert store.read_range("data/a", start=1, end=3) == b"hr"
    assert store.list("data") == {"a": 5}


def test_missing_object_is_file_not_found_and_its_deletion_is_no_error(store: Store) -> None:
    store.put("data/a", b"")
    with pytest.raises(FileNotFoundError):
        store.read("data/b")
    store.delete("data/b")
    store.delete("data/a")
    assert store.list("data") == {}


def test_list_is_empty_for_no_folder_and_leaves_out_subfolders(store: Store) -> None:
    assert store.list("data") == {}
    store.put("data/a", b"1")
    store.put("data/sub/b", b"2")
    assert store.list("data") == {"a": 1}


def test_create_of_a_taken_name_is_file_exists_and_changes_nothing(store: Store) -> None:
    store.create("x", b"mine")
    with pytest.raises(FileExistsError):
        store.create("x", b"theirs")
    assert store.read("x") == b"mine"


def test_create_that_finds_its_own_bytes_counts_as_done(store: Store) -> None:
    store.create("x", b"mine")
    store.create("x", b"mine")


@pytest.mark.usefixtures("atomic_moto")
def test_of_many_concurrent_creates_exactly_one_succeeds(store: Store) -> None:
    def attempt(number: int) -> bool:
        try:
            store.create("race", b"%d" % number)
            return True
        except FileExistsError:
            return False

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(attempt, range(16)))
    assert sum(won) == 1
    assert store.read("race") == b"%d" % won.index(True)


def lose_first_reply(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import s3fs.core
    from botocore.exceptions import ConnectionClosedError

    original, lost = s3fs.core._error_wrapper, []

    async def wrapper(func: Any, *, args: Any = (), kwargs: Any = None, retries: int) -> Any:
        async def once(*args: Any, **kwargs: Any) -> Any:
            answer = await func(*args, **kwargs)
            if func.__name__ == "put_object" and not lost:
                lost.append(func.__name__)
                raise ConnectionClosedError(endpoint_url="http://lost")
            return answer

        return await original(once, args=args, kwargs=kwargs, retries=retries)

    monkeypatch.setattr(s3fs.core, "_error_wrapper", wrapper)
    return lost


def test_create_whose_reply_was_lost_still_succeeds(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = lose_first_reply(monkeypatch)
    s3_store.create("x", b"mine")
    assert lost == ["put_object"]
    assert s3_store.read("x") == b"mine"


def test_put_whose_reply_was_lost_is_done_once_more(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = lose_first_reply(monkeypatch)
    s3_store.put("x", b"mine")
    assert lost == ["put_object"]
    assert s3_store.read("x") == b"mine"


@pytest.mark.long
def test_list_returns_more_objects_than_one_s3_page(s3_store: Store) -> None:
    import boto3

    client = boto3.client("s3")
    bucket = split_url(s3_store.root)[1].partition("/")[0]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda n: client.put_object(Bucket=bucket, Key=f"out/data/{n}", Body=b""), range(1050)):
            pass
    assert len(s3_store.list("data")) == 1050


def test_object_named_like_the_folder_is_not_listed_inside_it(s3_store: Store) -> None:
    s3_store.put("data", b"not a folder")
    assert s3_store.list("data") == {}


def test_missing_bucket_is_a_spec_error_that_names_it(s3_server: str) -> None:
    with pytest.raises(SpecError, match="tm-no-such-bucket"):
        Store("s3://tm-no-such-bucket/out").list("data")


def test_part_of_110_megabytes_goes_up_in_pieces_and_appears_whole(s3_store: Store) -> None:
    data = bytes(110 << 20)
    s3_store.put("data/big", data)
    assert s3_store.size("data/big") == len(data)


def test_local_put_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = Store(str(tmp_path)), []

    def trace(name: str, describe: Callable[..., str]) -> None:
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: (calls.append((name, describe(*args))), call(*args))[1])

    trace("fsync", lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))[-4:])
    trace("replace", lambda old, new: os.path.basename(new))
    store.put("x", b"1")
    assert calls == [("fsync", ".tmp"), ("replace", "x"), ("fsync", os.path.basename(tmp_path)[-4:])]


def test_new_folders_are_durable_before_anything_is_put_inside(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    Store(str(tmp_path / "a")).put("b/x", b"1")
    assert synced[:2] == [str(tmp_path), str(tmp_path / "a")]


@pytest.mark.parametrize("call", ["put", "create"])
def test_failed_write_leaves_neither_object_nor_temporary(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        getattr(Store(str(tmp_path)), call)("x", b"1")
    assert os.listdir(tmp_path) == []


def test_list_never_shows_temporaries_and_sweep_removes_them(tmp_path: Any) -> None:
    store = Store(str(tmp_path))
    store.put("data/a", b"1")
    (tmp_path / "data" / ".a.0123456789abcdef0123456789abcdef.tmp").write_bytes(b"half")
    assert store.list("data") == {"a": 1}
    assert store.sweep("data", older_than_s=60) == 0
    assert store.sweep("data") == 1
    assert os.listdir(tmp_path / "data") == ["a"]


def test_sweep_of_the_root_leaves_hidden_files_of_others_alone(tmp_path: Any) -> None:
    for name in (".summary.json.0123456789abcdef0123456789abcdef.tmp", ".theirs.tmp", ".bashrc"):
        (tmp_path / name).write_bytes(b"x")
    assert Store(str(tmp_path)).sweep() == 1
    assert sorted(os.listdir(tmp_path)) == [".bashrc", ".theirs.tmp"]


def test_list_is_whole_while_temporaries_come_and_go(tmp_path: Any) -> None:
    store, stop = Store(str(tmp_path)), threading.Event()
    store.put("data/kept", b"1")

    def churn() -> None:
        while not stop.is_set():
            store.put("data/other", b"2")

    writers = [threading.Thread(target=churn) for _ in range(2)]
    for writer in writers:
        writer.start()
    listings = [store.list("data") for _ in range(1000)]
    stop.set()
    for writer in writers:
        writer.join()
    assert all("kept" in listing for listing in listings)


def test_root_that_is_a_file_is_not_mistaken_for_a_lost_race(tmp_path: Any) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError):
        Store(str(tmp_path / "out")).create("x", b"1")


def test_file_system_without_hard_links_is_a_spec_error(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(local_objects.os, "link", refuse)
    with pytest.raises(SpecError, match="hard links"):
        Store(str(tmp_path)).create("x", b"1")


def test_tilde_and_symbolic_links_lead_to_the_same_objects(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    Store("~/link").put("data/a", b"1")
    assert Store(str(tmp_path / "real")).read("data/a") == b"1"
    assert Store("file://" + str(tmp_path / "link")).list("data") == {"a": 1}
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["", "/x", "a//b", "../x", "a/../b", "a/.", "a\0b"])
def test_name_that_would_leave_the_root_is_refused(tmp_path: Any, name: str) -> None:
    with pytest.raises(ValueError, match="would leave"):
        Store(str(tmp_path)).put(name, b"")


@pytest.mark.parametrize("url", ["http://h/x", "simplecache::s3://b/x", "ssh://h/x", "s3a://b", "a\0b", "memory://x"])
def test_url_off_the_allow_list_is_a_spec_error(url: str) -> None:
    with pytest.raises(SpecError):
        split_url(url)


def test_store_crosses_processes(store: Store) -> None:
    store.put("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


def test_storage_imports_nothing_heavy() -> None:
    code = "import pipeline.storage, pipeline.lease, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"ray", "torch", "transformers", "vllm", "pyarrow", "pandas", "numpy"}.isdisjoint(loaded)


def test_filesystems_are_not_shared_so_that_no_cached_listing_hides_a_commit(s3_store: Store) -> None:
    assert s3_store.list("data") == {}
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(s3_store.path("data/a"), b"1")
    assert s3_store.list("data") == {"a": 1}


def test_what_is_written_piece_by_piece_shows_whole_or_not_at_all(store: Store) -> None:
    store.put("x", b"earlier")
    with store.writing("x") as file:
        file.write(b"a" * 100_000)
        file.write(b"b")
        assert store.read("x") == b"earlier"
    assert store.read("x") == b"a" * 100_000 + b"b"
    with contextlib.suppress(KeyboardInterrupt), store.writing("x") as file:
        file.write(b"c")
        raise KeyboardInterrupt
    assert store.read("x") == b"a" * 100_000 + b"b"
