"""Errors as OpenAI's API says them: a status, and a body that its clients read. Pure.

Invariant: nothing in a body comes from an exception that wasn't raised on purpose, so no path or trace gets out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openai.types.shared import ErrorObject

from cluster.serve_types import ErrorBody
from pipeline.engine import Failure
from pipeline.errors import ReplicaDied, ReplicaHung, RequestRefused, RowError, TramontaneError

INVALID = "invalid_request_error"
SERVER = "server_error"
RATE = "rate_limit_error"
REQUEST_TIMEOUT = "request_timeout"
HANGED_UP = 499
"""For metrics: nobody is there any more to be told. nginx's number for it."""
MAX_MESSAGE_CHARS = 1000

_TOO_LONG = "prompt_too_long"
_CODES = {_TOO_LONG: "context_length_exceeded"}
"""Our kinds under the names that clients know."""


class ApiError(TramontaneError):
    """A request that gets no answer, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,  # noqa: A002  OpenAI's name
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message[:MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode()
        self.type = type
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """What the client is sent."""
        error = ErrorObject(message=self.message, type=self.type, param=self.param, code=self.code)
        return ErrorBody(error=error).model_dump(exclude={"error": {"misalignment"}})

    def headers(self) -> dict[str, str]:
        """To be sent along."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def of_row(error: RowError) -> ApiError:
    """A request that can't be made a prompt."""
    param = "messages" if error.kind in ("bad_messages", "empty_prompt", "null_prompt", _TOO_LONG) else None
    return ApiError(400, error.message, code=_CODES.get(error.kind, error.kind), param=param)


def of_failure(failure: Failure) -> ApiError:
    """A request that an engine refused, or failed for good."""
    if failure.kind == RequestRefused.kind:
        return ApiError(400, failure.message, code=failure.kind)
    if failure.kind == REQUEST_TIMEOUT:
        return timed_out()
    lost = failure.kind in (ReplicaDied.kind, ReplicaHung.kind)
    message = "the engine was lost with this request" if lost else "the engine failed this request"
    return ApiError(500, f"{message}; try again", type=SERVER, code=failure.kind)


def timed_out() -> ApiError:
    """A request that took too long."""
    return ApiError(504, "the answer took longer than a request may", type=SERVER, code=REQUEST_TIMEOUT)


def overloaded(message: str, *, retry_after_s: int = 1) -> ApiError:
    """A request that there is no room for."""
    return ApiError(503, message, type=SERVER, code="overloaded", retry_after_s=retry_after_s)


def of_validation(details: Sequence[Any]) -> ApiError:
    """A body that isn't what it should be, in pydantic's words; the first of its problems."""
    detail = details[0]
    path = [str(part) for part in detail["loc"][detail["loc"][:1] in (("body",), ("query",)) :]]
    if detail["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    if detail["type"] == "extra_forbidden":
        message = f"unsupported parameter `{'.'.join(path)[:100]}`; this endpoint doesn't have it, so leave it out"
        return ApiError(400, message, code="unsupported_parameter", param=".".join(path)[:100])
    where = ".".join(part for part in path if "[" not in part)[:100]
    if not where:
        return ApiError(400, "the body is not a JSON object, or not sent as application/json", code="invalid_value")
    return ApiError(400, f"`{where}`: {detail['msg']}", code="invalid_value", param=where)
