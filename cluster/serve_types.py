"""What requests may say: the `openai` package's own types, cut down to what this endpoint does, and a little more.

Names and types of the fields come from that package. A field that isn't listed here is refused by name, so that nobody
takes a parameter for heeded that isn't. No field names a path, a template or anything to load.
"""

from __future__ import annotations

import collections.abc
import types
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

from openai.types import batch_create_params, completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.shared import ErrorObject
from pydantic import BaseModel, ConfigDict, Field, create_model

from pipeline.openai_requests import URLS

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
Name = Annotated[str, Field(max_length=200)]


class TramontaneOptions(BaseModel):
    """What this endpoint can answer beyond OpenAI's."""

    model_config = STRICT

    routing: bool = False
    """Whether to return how often each expert was chosen for the request's tokens."""


class ErrorBody(BaseModel):
    """Every answer that isn't one."""

    error: ErrorObject


_OURS: dict[str, Any] = {
    "model": (Name, ...),
    "stream": (bool | None, None),
    "safe_prompt": (bool | None, None),
    "tramontane": (TramontaneOptions | None, None),
    "top_k": (Annotated[int, Field(ge=0)] | None, None),
    "min_p": (Annotated[float, Field(ge=0, le=1)] | None, None),
    "repetition_penalty": (Annotated[float, Field(gt=0, le=10)] | None, None),
}
_SHARED = (
    *("frequency_penalty", "presence_penalty", "temperature", "top_p"),
    *("max_tokens", "n", "seed", "stop", "stream_options", "user", "logprobs"),
)
_MESSAGE = ("role", "content", "name")


def _listed(hint: Any) -> Any:
    """The type with lists for iterables: pydantic would look at an iterable's items only when somebody reads them."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Required, NotRequired):
        return _listed(args[0])
    if origin in (Union, types.UnionType):
        return Union[tuple(_listed(arg) for arg in args)]  # noqa: UP007  built from values
    if origin in (collections.abc.Iterable, collections.abc.Sequence):
        return list[_listed(args[0])]  # type: ignore[misc]
    return hint


def _cut_down(name: str, params: Any, fields: tuple[str, ...], **others: Any) -> Any:
    hints = get_type_hints(params, include_extras=True)
    taken: dict[str, Any] = {}
    for field in fields:
        hint = _listed(hints[field])
        taken[field] = (hint, ...) if get_origin(hints[field]) is Required else (hint | None, None)
    return create_model(name, __config__=STRICT, __doc__=f"What {name} may hold.", **{**taken, **others})


_MESSAGES = tuple(
    _cut_down(f"{role}Message", params, _MESSAGE)
    for role, params in {
        "Developer": ChatCompletionDeveloperMessageParam,
        "System": ChatCompletionSystemMessageParam,
        "User": ChatCompletionUserMessageParam,
        "Assistant": ChatCompletionAssistantMessageParam,
    }.items()
)
Message: Any = Annotated[Union[_MESSAGES], Field(discriminator="role")]  # noqa: UP007  built from values
_CHAT_ONLY = ("max_completion_tokens", "top_logprobs", "response_format")

ChatRequest: Any = _cut_down(
    "ChatRequest",
    chat_create_params.CompletionCreateParamsBase,
    (*_SHARED, *_CHAT_ONLY),
    messages=(Annotated[list[Message], Field(min_length=1)], ...),
    **_OURS,
)
"""Body of /v1/chat/completions."""

CompletionRequest: Any = _cut_down(
    "CompletionRequest",
    completion_create_params.CompletionCreateParamsBase,
    _SHARED,
    prompt=(str | list[str] | list[int] | list[list[int]], ...),
    **_OURS,
)
"""Body of /v1/completions."""

_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]

BatchRequest: Any = _cut_down(
    "BatchRequest",
    batch_create_params.BatchCreateParams,
    ("completion_window", "input_file_id"),
    endpoint=(Literal[URLS], ...),
    metadata=(Annotated[dict[_Key, _Value], Field(max_length=16)] | None, None),
)
"""Body of /v1/batches."""

RequestKind = Literal["chat", "completion"]
