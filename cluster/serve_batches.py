"""The routes of OpenAI's files and batches: what comes in is put into folders, what is asked for is read from there.

Knows FastAPI and the folders; starts nothing itself. Invariant: every look-up goes through the caller's own folder, so
nobody sees, uses or deletes what is another's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from openai.types import Batch, FileDeleted, FileObject
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.types import Receive, Scope, Send

from cluster import batch_files, batch_records
from cluster.batch_files import FileShelf, new_file_id
from cluster.batch_queue import BatchQueue
from cluster.batch_records import BatchFolder, BatchRecords, new_batch
from cluster.batch_states import describe, is_over, status_of
from cluster.batch_upkeep import num_bytes
from cluster.serve_errors import RATE, ApiError
from cluster.serve_http import CALLER
from cluster.serve_settings import ServeSettings
from cluster.serve_types import BatchRequest
from pipeline.errors import SpecError

FILES, BATCHES = "/v1/files", "/v1/batches"
MAX_OPEN_BATCHES = 100
"""Of each key, that aren't over."""
OFF = "this endpoint has no files and batches: whoever operates it has to start it with `--batches DIRECTORY`"
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
    "additionalProperties": False,
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}

T = TypeVar("T", FileObject, BatchFolder)
After = Annotated[str | None, Query(max_length=200)]


class _Page(BaseModel):
    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(_Page):
    """A page of files."""

    data: list[FileObject]


class BatchList(_Page):
    """A page of batches."""

    data: list[Batch]


@dataclass(frozen=True, slots=True)
class BatchDesk:
    """All that the routes need."""

    root: Path
    files: FileShelf
    records: BatchRecords
    queue: BatchQueue
    settings: ServeSettings


def open_desk(root: Path, make_queue: Callable[[BatchRecords], BatchQueue], settings: ServeSettings) -> BatchDesk:
    """Open the directory, with all that is in it already.

    Raises:
        SpecError: nothing can be written there.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (batch_files.FILES, batch_records.BATCHES):
            (root / name).mkdir(exist_ok=True)
        records = BatchRecords(root)
        return BatchDesk(root, FileShelf(root), records, make_queue(records), settings)
    except OSError as error:
        raise SpecError(f"--batches {root} can't be used: {error}; choose a directory of the head node") from error


def add_batch_routes(app: FastAPI, desk: BatchDesk | None, errors: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes; without a desk, ones that say why there are none."""
    if desk is None:
        methods = ["GET", "POST", "DELETE"]
        for path in (FILES, BATCHES):
            app.add_api_route(path + "{rest:path}", _off, methods=methods, include_in_schema=False)
        return
    routes = _Routes(desk)

    def add(method: str, path: str, handler: Callable[..., Any], model: Any, **options: Any) -> None:
        options = {"responses": errors, "response_model": model, **options}
        app.add_api_route(path, handler, methods=[method], **options)

    add("POST", FILES, routes.upload, FileObject, openapi_extra=_UPLOAD)
    add("GET", FILES, routes.list_files, FileList)
    add("GET", FILES + "/{file_id}", routes.file, FileObject)
    add("DELETE", FILES + "/{file_id}", routes.delete_file, FileDeleted)
    content = {**_CONTENT, **errors}
    add("GET", FILES + "/{file_id}/content", routes.content, None, response_class=FileResponse, responses=content)
    add("POST", BATCHES, routes.create, Batch)
    add("GET", BATCHES, routes.list_batches, BatchList)
    add("GET", BATCHES + "/{batch_id}", routes.batch, Batch)
    add("POST", BATCHES + "/{batch_id}/cancel", routes.cancel, Batch)


def _off() -> None:
    raise ApiError(404, OFF, code="batches_off")


class _Whole(FileResponse):
    """Sends all of a file; what is asked for by `Range` would be answered in ways that OpenAI's API doesn't have."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in (b"range", b"if-range")]
        await super().__call__({**scope, "headers": headers}, receive, send)


class _Routes:
    """The handlers. Those that are no coroutines run on threads: they read files."""

    def __init__(self, desk: BatchDesk) -> None:
        self._desk = desk

    async def upload(self, request: Request) -> FileObject:
        """Keep a file of requests."""
        async with request.form(max_files=1, max_fields=8, max_part_size=4096) as form:
            file = form.get("file")
            unknown = next((name for name in form if name not in ("file", "purpose")), None)
            if unknown is not None:
                raise _bad(
                    f"unsupported parameter `{unknown[:100]}`; leave it out", unknown[:100], "unsupported_parameter"
                )
            if form.get("purpose") != "batch":
                raise _bad("`purpose` must be `batch`: files are for batches here", "purpose")
            if not isinstance(file, UploadFile):
                raise _bad("`file` is missing, or no file of a multipart/form-data body", "file")
            return await run_in_threadpool(self._keep, request.scope[CALLER], file)

    def list_files(
        self,
        request: Request,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=64)] = None,
    ) -> FileList:
        """List the caller's files."""
        found = self._desk.files.listed(request.scope[CALLER])
        found = [file for file in found if purpose in (None, file.purpose)]
        ids = [file.id for file in found]
        if order == "asc":
            found, ids = found[::-1], ids[::-1]
        page, has_more = _page(found, ids, after, limit)
        return FileList(data=page, **_ends([file.id for file in page], has_more=has_more))

    def file(self, file_id: str, request: Request) -> FileObject:
        """Describe a file."""
        return self._find(request.scope[CALLER], file_id)

    def content(self, file_id: str, request: Request) -> FileResponse:
        """Send a file's bytes."""
        self._find(request.scope[CALLER], file_id)
        path = self._desk.files.content_path(request.scope[CALLER], file_id)
        return _Whole(path, media_type="application/octet-stream", filename=path.name)

    def delete_file(self, file_id: str, request: Request) -> FileDeleted:
        """Delete a file; batches that were created with it go on."""
        if not self._desk.files.delete(request.scope[CALLER], file_id):
            raise _no_file(file_id)
        return FileDeleted(id=file_id, object="file", deleted=True)

    async def create(self, body: BatchRequest, request: Request) -> Batch:
        """Have the requests of a file answered."""
        folder = await run_in_threadpool(self._create, request.scope[CALLER], body)
        self._desk.queue.wake()
        return await run_in_threadpool(self._describe, folder)

    def list_batches(
        self, request: Request, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> BatchList:
        """List the caller's batches."""
        folders = self._desk.records.owned(request.scope[CALLER])
        page, has_more = _page(folders, [folder.path.name for folder in folders], after, limit)
        data = []
        for folder in page:
            with contextlib.suppress(
                FileNotFoundError, ValueError
            ):  # gone just now, or broken: the queue's log says so
                data.append(self._describe(folder))
        return BatchList(data=data, **_ends([folder.path.name for folder in page], has_more=has_more))

    def batch(self, batch_id: str, request: Request) -> Batch:
        """Describe a batch."""
        return self._describe(self._find_batch(request.scope[CALLER], batch_id))

    async def cancel(self, batch_id: str, request: Request) -> Batch:
        """End a batch with the results that it has by then."""
        folder = await run_in_threadpool(self._cancel, request.scope[CALLER], batch_id)
        self._desk.queue.wake()
        return await run_in_threadpool(self._describe, folder)

    def _keep(self, owner: str, file: UploadFile) -> FileObject:
        limit = self._desk.settings.max_file_bytes
        size = file.size or 0
        if size > limit:
            raise ApiError(413, f"the file is larger than {limit} bytes; make several of it", code="file_too_large")
        self._check_room(owner, size)
        name = file.filename or "upload.jsonl"
        return self._desk.files.add(owner, file.file, name=name, purpose="batch", file_id=new_file_id())

    def _create(self, owner: str, body: Any) -> BatchFolder:
        file = self._find(owner, body.input_file_id, param="input_file_id")
        if file.purpose != "batch":
            raise _bad(f"file {file.id} has purpose {file.purpose}; a batch's must be `batch`", "input_file_id")
        if self._desk.queue.num_open(owner) >= MAX_OPEN_BATCHES:
            message = f"{MAX_OPEN_BATCHES} of your batches aren't over; wait until one is, or cancel one"
            raise ApiError(429, message, type=RATE, code="too_many_batches", retry_after_s=60)
        self._check_room(owner, 0)
        created = new_batch(
            input_file_id=file.id,
            endpoint=body.endpoint,
            metadata=body.metadata,
            model=self._desk.queue.served.model_name,
            ids=(new_file_id(), new_file_id()),
        )
        folder = self._desk.records.create(owner, self._desk.files.content_path(owner, file.id), created)
        self._desk.queue.add(folder)  # here: a caller who hangs up ends the handler, never this thread
        return folder

    def _check_room(self, owner: str, size: int) -> None:
        total = self._desk.settings.max_stored_bytes
        if num_bytes(self._desk.root, owner) + size > total:
            message = f"your files and batches would take more than {total} bytes together; delete files"
            raise ApiError(413, message, code="storage_limit_exceeded")

    def _cancel(self, owner: str, batch_id: str) -> BatchFolder:
        folder = self._find_batch(owner, batch_id)
        facts = folder.facts()
        if is_over(facts) or facts.finalizing is not None or facts.given_up is not None:
            message = f"batch {batch_id} is {status_of(facts)} and can't be cancelled any more"
            raise ApiError(409, message, code="batch_not_cancellable")
        folder.note_cancel()
        return folder

    def _describe(self, folder: BatchFolder) -> Batch:
        facts = folder.facts()
        return describe(facts, None if is_over(facts) else self._desk.queue.runner.counts(folder.path))

    def _find(self, owner: str, file_id: str, *, param: str = "file_id") -> FileObject:
        file = self._desk.files.find(owner, file_id)
        if file is None:
            raise _no_file(file_id, param)
        return file

    def _find_batch(self, owner: str, batch_id: str) -> BatchFolder:
        folder = self._desk.records.find(owner, batch_id)
        if folder is None:
            raise ApiError(404, f"you have no batch {batch_id[:100]!r}", code="batch_not_found", param="batch_id")
        return folder


def _page(found: Sequence[T], ids: Sequence[str], after: str | None, limit: int) -> tuple[list[T], bool]:
    """At most `limit` of what follows the one with the id `after`, and whether there is more."""
    if after is not None and after not in ids:
        raise ApiError(400, f"`after`: there is no {after[:100]!r} in this list", code="invalid_value", param="after")
    rest = found[ids.index(after) + 1 :] if after is not None else found
    return list(rest[:limit]), len(rest) > limit


def _ends(ids: Sequence[str], *, has_more: bool) -> dict[str, Any]:
    return {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None, "has_more": has_more}


def _no_file(file_id: str, param: str = "file_id") -> ApiError:
    return ApiError(404, f"you have no file {file_id[:100]!r}", code="file_not_found", param=param)


def _bad(message: str, param: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)
