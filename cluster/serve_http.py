"""What every HTTP request passes before it is looked at: key, rate, size, patience. And streams on their way out.

Plain ASGI, so that nothing of a request is read before its key is known. Invariants: memory per request is bounded by
`max_body_bytes`; no answer begins before it is known to be one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serve_errors import HANGED_UP, RATE, REQUEST_TIMEOUT, ApiError, overloaded
from cluster.serve_keys import KeyFile
from cluster.serve_limits import RateLimiter
from cluster.serve_settings import ServeSettings

T = TypeVar("T")

MAX_OPEN = 1000
"""Requests that may be open at once, whatever they do; each may hold a body."""
NOBODY = "anonymous"
"""Whose requests those without a key are, where none is needed."""
CALLER = "tramontane.caller"
"""Where the scope of a request that was let in says whose it is."""
UPLOADS = "/v1/files"
MAX_UPLOADS = 8
"""That may be under way at once: Serve's proxy takes in what comes as fast as it comes."""
_FORM_BYTES = 64 << 10
"""What an upload's form may hold beside the file."""


class HungUp(Exception):
    """The client is gone; nobody is to be told."""


class Gate:
    """Lets requests in that may come in, with their whole body; answers the others.

    Guarantees:
    - without a valid key, where keys are needed, every path is answered 401 and no body is read.
    - a body over the limit is answered 413 before the rest of it is read; one that doesn't come in time, 408.
    - an upload is not held in memory, and whose request it is, is known to whoever handles it.
    """

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, *, keys: KeyFile | None, answered: Callable[[Scope, int], None]
    ) -> None:
        """`answered` is told route and status of every answer."""
        self._app = app
        self._settings = settings
        self._keys = keys
        self._rates = RateLimiter(settings.requests_per_minute)
        self._answered = answered
        self._num_open = 0
        self._num_uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        status = HANGED_UP

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._num_open += 1
        try:
            await self._handle(scope, receive, send_on)
        finally:
            self._num_open -= 1
            self._answered(scope, status)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            if self._num_open > MAX_OPEN:
                raise overloaded(f"{MAX_OPEN} requests are open; try again")
            caller = self._caller(headers)
            self._check_rate(scope, caller)
            scope = {**scope, CALLER: caller}
            if self._is_upload(scope):
                await self._take_upload(scope, headers, receive, send)
                return
            body = await self._body(headers, receive)
        except HungUp:
            return
        except ApiError as error:
            await send_error(error, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _is_upload(self, scope: Scope) -> bool:
        return self._settings.batches is not None and (scope["method"], scope["path"]) == ("POST", UPLOADS)

    async def _take_upload(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        limit = self._settings.max_file_bytes + _FORM_BYTES
        if _announced(headers) > limit:
            raise _too_large(self._settings.max_file_bytes)
        if self._num_uploads >= MAX_UPLOADS:
            raise overloaded(f"{MAX_UPLOADS} uploads are under way; try again")
        self._num_uploads += 1
        try:
            metered = Metered(receive, limit=limit, timeout_s=self._settings.upload_timeout_s)
            await self._app(scope, metered, send)
        finally:
            self._num_uploads -= 1

    def _caller(self, headers: dict[bytes, bytes]) -> str:
        if self._keys is None:
            return NOBODY
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        name = self._keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            message = "this endpoint needs an API key that it knows: `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")
        return name

    def _check_rate(self, scope: Scope, caller: str) -> None:
        wait_s = self._rates.wait_s(caller, time.monotonic()) if scope["method"] == "POST" else None
        if wait_s is not None:
            message = f"more than {self._settings.requests_per_minute} requests in a minute; try again in {wait_s} s"
            raise ApiError(429, message, type=RATE, code="rate_limit_exceeded", retry_after_s=wait_s)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        if _announced(headers) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HungUp
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(408, "the body didn't arrive in time", code=REQUEST_TIMEOUT) from None


def _announced(headers: dict[bytes, bytes]) -> int:
    """Bytes that the body is to have, as far as the client says."""
    announced = headers.get(b"content-length", b"0")
    return int(announced[:20]) if announced.isdigit() else 0


class Metered:
    """Passes a body on as it comes, up to so many bytes and for so long.

    Raises:
        ApiError: it is too large, or too slow.
        HungUp: the client is gone before its end.
    """

    def __init__(self, receive: Receive, *, limit: int, timeout_s: float) -> None:
        self._receive = receive
        self._limit = limit
        self._left = limit
        self._ends_at = time.monotonic() + timeout_s
        self._is_whole = False

    async def __call__(self) -> Message:
        """The next piece."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._ends_at - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the upload didn't arrive in time", code=REQUEST_TIMEOUT) from None
        if message["type"] == "http.disconnect":
            raise HungUp
        self._left -= len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._left < 0:
            raise _too_large(self._limit)
        return message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes; send less at once", code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, and then whatever still comes: the client's end."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def send_error(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
    encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


async def unless_hung_up(receive: Receive, work: Awaitable[T]) -> T:
    """Result of the work, which is cancelled as soon as the client is gone.

    Raises:
        HungUp: it is.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HungUp
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events as an ASGI answer; whatever ends it ends what it reads from, too."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        """`events`: the data of each, in order."""
        super().__init__(media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI's
        """Send all events, unless the client is gone before."""
        try:
            await unless_hung_up(receive, self._write(send))
        except HungUp:
            pass
        finally:
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
