"""What is known of each batch: a folder of small files, each written once by one process.

    batches/of-OWNER/batch_HEX/batch.json        what was asked for
                               input.jsonl       the requests, whatever becomes of the file that they came in
                               checked.json      how many requests there are, or what is wrong with the file
                               cancel.json       somebody wants it to end
                               given_up.json     its run failed again and again; what it has is to be written
                               finalizing.json   its results are being written
                               ended.json        how it ended
                               job.yaml, run/    the run that answers it; its rows go when it has ended
                               results/          its files as they are being written
                               process.log       what its processes said

Knows nothing of processes. Invariant: what a batch is follows from these files alone (`batch_states`), so an endpoint
that starts again knows all that the last one knew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from openai.types import BatchError, BatchRequestCounts, BatchUsage
from pydantic import BaseModel, Field

from cluster.batch_files import owner_folder
from pipeline import local_objects
from pipeline.parts import DATA
from pipeline.settings import Settings

logger = logging.getLogger(__name__)

BATCHES = "batches"
RECORD = "batch.json"
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
WINDOW_S = 24 * 3600
"""OpenAI's one completion window, 24h."""
INPUT, RUN, RESULTS, SPEC, LOG = "input.jsonl", "run", "results", "job.yaml", "process.log"
_LAST_LINES, _LAST_CHARACTERS = 5, 1000

End = Literal["completed", "failed", "cancelled", "expired"]
M = TypeVar("M", bound=BaseModel)


class Created(Settings):
    """A batch as it was asked for."""

    id: str
    created_ns: int
    """Orders those that wait."""
    expires_at: int
    """Seconds since the epoch, as all times here."""
    input_file_id: str
    output_file_id: str
    """What its results will be called, so that writing them twice is writing them once."""
    error_file_id: str
    endpoint: str
    metadata: dict[str, str] | None
    model: str
    """The name that its requests must give."""

    @property
    def created_at(self) -> int:
        """Seconds since the epoch."""
        return self.created_ns // 10**9


class Checked(Settings):
    """What reading the file found."""

    at: int
    num_requests: int
    errors: list[BatchError] = Field(default_factory=list)
    """Of lines that are no requests; one is enough for the batch to fail."""


class Mark(Settings):
    """That something happened."""

    at: int


class GivenUp(Settings):
    """That it won't be tried any more."""

    at: int
    errors: list[BatchError]
    """Why."""


class Ended(Settings):
    """How it ended."""

    at: int
    status: End
    counts: BatchRequestCounts
    errors: list[BatchError] = Field(default_factory=list)
    has_output: bool = False
    has_error_file: bool = False
    usage: BatchUsage | None = None
    keeps_rows: bool = False
    """Whether its rows stay in its folder, because they could not be written to its files."""


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """All that is known of one batch at a moment; None for what hasn't happened."""

    created: Created
    checked: Checked | None = None
    cancel: Mark | None = None
    given_up: GivenUp | None = None
    finalizing: Mark | None = None
    ended: Ended | None = None
    has_run: bool = False
    """Whether a run of it was begun."""


@dataclass(frozen=True, slots=True)
class BatchFolder:
    """One batch's files."""

    path: Path

    @property
    def owner(self) -> str:
        """Name of the key that it belongs to."""
        return self.path.parent.name.removeprefix("of-")

    @property
    def root(self) -> Path:
        """Directory of all batches and files."""
        return self.path.parent.parent.parent

    def facts(self) -> BatchFacts:
        """What is known now.

        Raises:
            FileNotFoundError: there is no such batch.
        """
        return BatchFacts(
            created=Created.model_validate_json((self.path / RECORD).read_bytes()),
            checked=self._read("checked", Checked),
            cancel=self._read("cancel", Mark),
            given_up=self._read("given_up", GivenUp),
            finalizing=self._read("finalizing", Mark),
            ended=self._read("ended", Ended),
            has_run=(self.path / RUN).is_dir(),
        )

    def note_checked(self, num_requests: int, errors: list[BatchError]) -> None:
        """The file has been read."""
        self._write("checked", Checked(at=int(time.time()), num_requests=num_requests, errors=errors))

    def note_cancel(self) -> None:
        """Somebody wants it to end; the first who does counts."""
        with contextlib.suppress(FileExistsError):
            local_objects.create(str(self.path / "cancel.json"), _bytes(Mark(at=int(time.time()))))

    def note_given_up(self, errors: list[BatchError]) -> None:
        """No more is tried; what was answered is still to be written to its files."""
        self._write("given_up", GivenUp(at=int(time.time()), errors=errors))

    def note_finalizing(self) -> None:
        """No more requests will be answered."""
        self._write("finalizing", Mark(at=int(time.time())))

    def note_ended(self, ended: Ended) -> None:
        """It is over; its rows live on in its files alone, which their owner can delete."""
        self._write("ended", ended)
        if not ended.keeps_rows:
            self.forget_rows()

    def forget_rows(self) -> None:
        """Remove prompts and completions; again and again is as well as once."""
        for each in (self.path / INPUT, self.path / RUN / DATA, self.path / RESULTS):
            shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink(missing_ok=True)

    def drop(self) -> None:
        """Remove the batch; from the first moment on there is none, however far this gets."""
        (self.path / RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def last_words(self) -> str:
        """The end of what its processes said."""
        try:
            said = (self.path / LOG).read_bytes()[-4 * _LAST_CHARACTERS :].decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return "\n".join(lines[-_LAST_LINES:])[-_LAST_CHARACTERS:]

    def _read(self, name: str, kind: type[M]) -> M | None:
        try:
            return kind.model_validate_json((self.path / f"{name}.json").read_bytes())
        except FileNotFoundError:
            return None

    def _write(self, name: str, fact: BaseModel) -> None:
        local_objects.replace(str(self.path / f"{name}.json"), _bytes(fact))


class BatchRecords:
    """All batches under one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """Directory of all batches and files."""
        self._root = root / BATCHES

    def create(self, owner: str, input_path: Path, created: Created) -> BatchFolder:
        """Take down a new batch of the requests at `input_path`, which may be deleted afterwards."""
        folder = BatchFolder(self._root / owner_folder(owner) / created.id)
        folder.path.mkdir(parents=True)
        try:
            os.link(input_path, folder.path / INPUT)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(input_path, folder.path / INPUT)
        local_objects.replace(str(folder.path / RECORD), _bytes(created))
        return folder

    def find(self, owner: str, batch_id: str) -> BatchFolder | None:
        """The owner's batch of this id; None when there is none, whoever else may have one."""
        if BATCH_ID.fullmatch(batch_id) is None:
            return None
        folder = BatchFolder(self._root / owner_folder(owner) / batch_id)
        return folder if (folder.path / RECORD).exists() else None

    def owned(self, owner: str) -> list[BatchFolder]:
        """All of the owner's batches, newest first."""
        return _in_order(_folders(self._root / owner_folder(owner)))[::-1]

    def everybodys(self) -> list[BatchFolder]:
        """All batches, oldest first."""
        owners = sorted(self._root.iterdir()) if self._root.is_dir() else []
        return _in_order(folder for owner in owners for folder in _folders(owner))


def new_batch(
    *, input_file_id: str, endpoint: str, metadata: dict[str, str] | None, model: str, ids: tuple[str, str]
) -> Created:
    """A batch that begins now; `ids` are those of its output and its error file."""
    now_ns = time.time_ns()
    return Created(
        id=f"batch_{secrets.token_hex(16)}",
        created_ns=now_ns,
        expires_at=now_ns // 10**9 + WINDOW_S,
        input_file_id=input_file_id,
        output_file_id=ids[0],
        error_file_id=ids[1],
        endpoint=endpoint,
        metadata=metadata,
        model=model,
    )


def _folders(owner: Path) -> Iterator[BatchFolder]:
    if owner.is_dir():
        for path in owner.iterdir():
            if BATCH_ID.fullmatch(path.name) and (path / RECORD).exists():
                yield BatchFolder(path)


def _in_order(folders: Iterable[BatchFolder]) -> list[BatchFolder]:
    """Oldest first; without those whose record can't be read, which are nobody's reason to lose sight of the others."""
    dated = []
    for folder in folders:
        try:
            dated.append((_created_ns(folder), folder))
        except FileNotFoundError:  # it went just now
            continue
        except (OSError, ValueError) as error:
            logger.warning("batch %s is left alone; its %s can't be read: %s", folder.path, RECORD, error)
    return [folder for _, folder in sorted(dated, key=lambda each: each[0])]


@functools.lru_cache(maxsize=100_000)
def _created_ns(folder: BatchFolder) -> int:
    """From memory, once read: it never changes, and thousands may be listed again and again."""
    return Created.model_validate_json((folder.path / RECORD).read_bytes()).created_ns


def _bytes(fact: BaseModel) -> bytes:
    return fact.model_dump_json(indent=1).encode()
