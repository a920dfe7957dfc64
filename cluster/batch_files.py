"""Files of the batch API: what was uploaded, and results. Each is seen by whose it is, and by nobody else.

    files/of-OWNER/file-HEX.json     what OpenAI's API says of it
    files/of-OWNER/file-HEX.jsonl    its bytes

Paths are made of random ids and of the names of API keys; a user's own name for a file is only a value in its record.
Invariant: a record is there only with its bytes, so what is listed can be read.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import BinaryIO, Literal

from openai.types import FileObject

from pipeline import local_objects
from pipeline.settings import Settings

FILES = "files"
FILE_ID = re.compile(r"file-[0-9a-f]{32}")
_OWNER = re.compile(r"[A-Za-z0-9._-]{1,64}")

Purpose = Literal["batch", "batch_output"]


def owner_folder(owner: str) -> str:
    """Name of the folder of what belongs to the key of this name."""
    if _OWNER.fullmatch(owner) is None:
        raise ValueError(f"{owner!r} is no name of a key")
    return f"of-{owner}"


def new_file_id() -> str:
    """128 random bits: nobody guesses another's."""
    return f"file-{secrets.token_hex(16)}"


class StoredFile(Settings):
    """A file's record; never changes."""

    created_ns: int
    """Orders files of one second."""
    file: FileObject


class FileShelf:
    """All files under one directory.

    Guarantees:
    - no id and no file name, whatever is in it, leads out of the owner's own folder.
    - adding under an id that is there puts the same file there again.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / FILES
        self._known: dict[Path, StoredFile] = {}

    def add(self, owner: str, content: BinaryIO, *, name: str, purpose: Purpose, file_id: str) -> FileObject:
        """Keep a copy of the content."""
        path = self.content_path(owner, file_id)
        with local_objects.writing(str(path)) as kept:
            shutil.copyfileobj(content, kept, 1 << 20)
            num_bytes = kept.tell()
        now_ns = time.time_ns()
        file = FileObject(
            id=file_id,
            bytes=num_bytes,
            created_at=now_ns // 10**9,
            filename=name[:255].encode("utf-8", "replace").decode(),
            object="file",
            purpose=purpose,
            status="processed",
        )
        record = StoredFile(created_ns=now_ns, file=file)
        local_objects.replace(str(path.with_suffix(".json")), record.model_dump_json().encode())
        return file

    def find(self, owner: str, file_id: str) -> FileObject | None:
        """The owner's file of this id; None when there is none, whoever else may have one."""
        if FILE_ID.fullmatch(file_id) is None:
            return None
        record = self._read(self.content_path(owner, file_id).with_suffix(".json"))
        return None if record is None else record.file

    def content_path(self, owner: str, file_id: str) -> Path:
        """Where its bytes are; `file_id` is one of ours.

        Raises:
            ValueError: it isn't.
        """
        if FILE_ID.fullmatch(file_id) is None:
            raise ValueError(f"{file_id!r} is no id of a file")
        return self._root / owner_folder(owner) / f"{file_id}.jsonl"

    def listed(self, owner: str) -> list[FileObject]:
        """All of the owner's files, newest first."""
        names = local_objects.sizes(str(self._root / owner_folder(owner)))
        paths = [self._root / owner_folder(owner) / name for name in names if name.endswith(".json")]
        found = [record for path in paths if (record := self._read(path)) is not None]
        return [record.file for record in sorted(found, key=lambda record: record.created_ns, reverse=True)]

    def delete(self, owner: str, file_id: str) -> bool:
        """Remove a file; returns whether there was one."""
        if self.find(owner, file_id) is None:
            return False
        path = self.content_path(owner, file_id)
        for each in (path.with_suffix(".json"), path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each)
            self._known.pop(each, None)
        return True

    def _read(self, path: Path) -> StoredFile | None:
        """From memory, once read: thousands may be listed again and again."""
        known = self._known.get(path)
        if known is not None and path.exists():
            return known
        try:
            read = self._known[path] = StoredFile.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        return read
