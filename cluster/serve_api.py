"""The routes of OpenAI's API, on top of one model's prompts and generation.

Knows FastAPI; nothing of Ray Serve. Nothing in a request can name a template, a path or a model to load: `model` is
compared with the one name there is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Scope

from cluster.serve_answers import Answer
from cluster.serve_batches import BATCHES, FILES, BatchDesk, add_batch_routes
from cluster.serve_errors import HANGED_UP, SERVER, ApiError, of_validation, overloaded
from cluster.serve_generation import Generation, Told
from cluster.serve_http import EventStream, Gate, HungUp, unless_hung_up
from cluster.serve_keys import KeyFile
from cluster.serve_metrics import CONTENT_TYPE, Metrics
from cluster.serve_prompts import Asked, PromptMaker
from cluster.serve_settings import ServeSettings
from cluster.serve_types import ChatRequest, CompletionRequest, ErrorBody
from pipeline.replica_answers import RowResult

CHAT, COMPLETIONS, MODELS, HEALTH, METRICS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz", "/metrics"),
)
ROUTES = (CHAT, COMPLETIONS, MODELS, HEALTH, METRICS, FILES, BATCHES)
OWNER = "tramontane"
_STATUSES = {400: "the request is wrong", 401: "no valid key", 404: "no such thing", 408: "the body came too slowly"}
_STATUSES |= {409: "it is too late for that", 413: "the body is too large", 429: "too many requests"}
_STATUSES |= {500: "the engine failed"}
_STATUSES |= {503: "no room", 504: "it took too long"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _STATUSES.items()
}


_EVENT = {
    "type": "object",
    "description": "An event of a stream, asked for by `stream: true`.",
    "properties": {
        "data": {"type": "string", "description": "A chunk of the answer, or an error, as JSON; `[DONE]` at the end."}
    },
    "required": ["data"],
}


class ModelList(BaseModel):
    """All models that there are: one."""

    object: str
    data: list[Model]


class Health(BaseModel):
    """How the endpoint is."""

    status: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """All that answering takes."""

    model: Model
    prompts: PromptMaker
    generation: Generation
    metrics: Metrics
    settings: ServeSettings
    batches: BatchDesk | None = None
    """None where there are none."""


def make_app(endpoint: Endpoint) -> Any:
    """The whole ASGI application."""
    api = _Api(endpoint)
    app = FastAPI(title="Tramontane", version="1", docs_url=None, redoc_url=None)
    streams = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}, **ERRORS}
    app.add_api_route(CHAT, api.chat, methods=["POST"], response_model=ChatCompletion, responses=streams)
    app.add_api_route(COMPLETIONS, api.completion, methods=["POST"], response_model=Completion, responses=streams)
    app.add_api_route(MODELS, api.models, methods=["GET"], response_model=ModelList, responses=ERRORS)
    app.add_api_route(MODELS + "/{name:path}", api.model, methods=["GET"], response_model=Model, responses=ERRORS)
    app.add_api_route(HEALTH, api.health, methods=["GET"], response_model=Health, responses=ERRORS)
    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **ERRORS}
    app.add_api_route(METRICS, api.metrics, methods=["GET"], response_class=Response, responses=text)
    add_batch_routes(app, endpoint.batches, ERRORS)
    for kind, answer in ((ApiError, _refused), (RequestValidationError, _invalid), (HTTPException, _no_route)):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(HungUp, lambda *_: Response(status_code=HANGED_UP))
    _describe(app, endpoint.model.id, needs_key=endpoint.settings.keys is not None)
    keys = KeyFile(Path(endpoint.settings.keys)) if endpoint.settings.keys is not None else None
    return Gate(app, endpoint.settings, keys=keys, answered=api.answered)


class _Api:
    """The handlers; one instance per endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        """One thread: see `PromptMaker`. Others' streams go on while it works at a long prompt."""

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await self._answer(body, request, self._endpoint.prompts.chat)

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await self._answer(body, request, self._endpoint.prompts.completion)

    async def models(self) -> ModelList:
        """List the models."""
        return ModelList(object="list", data=[self._endpoint.model])

    async def model(self, name: str) -> Model:
        """Describe one model."""
        self._check_model(name)
        return self._endpoint.model

    async def health(self) -> Health:
        """Say whether requests can be answered."""
        generation = self._endpoint.generation
        if generation.failure is not None or generation.draining or not generation.num_replicas:
            raise overloaded("no replica of the model is up", retry_after_s=5)
        return Health(status="ok", replicas=generation.num_replicas)

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(self._endpoint.metrics.text(), media_type=CONTENT_TYPE)

    def answered(self, scope: Scope, status: int) -> None:
        """Take note of an answer."""
        if status == HANGED_UP:
            self._endpoint.metrics.hung_up()
        route = next((route for route in ROUTES if scope["path"].startswith(route)), "other")
        self._endpoint.metrics.answered(route, status)

    def _check_model(self, name: str) -> None:
        if name != self._endpoint.model.id:
            message = f"there is no model {name[:100]!r} here; there is {self._endpoint.model.id!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    async def _answer(self, body: Any, request: Request, read: Callable[[Any], Asked]) -> Response:
        arrived = time.monotonic()
        self._check_model(body.model)
        asked = await asyncio.get_running_loop().run_in_executor(self._encoding, read, body)
        answer = Answer(asked, self._endpoint.model.id)
        if asked.stream:
            events = self._endpoint.generation.stream(asked)
            first = await unless_hung_up(request.receive, anext(events))  # no 200 before it is known to be one
            return EventStream(self._events(asked, answer, first, events, arrived))
        results = await unless_hung_up(request.receive, self._endpoint.generation.whole(asked))
        self._endpoint.metrics.generated(asked, results, took_s=time.monotonic() - arrived)
        return Response(_json(answer.whole(results)), media_type="application/json")

    async def _events(
        self,
        asked: Asked,
        answer: Answer,
        first: Told | list[RowResult],
        rest: AsyncGenerator[Told | list[RowResult]],
        arrived: float,
    ) -> AsyncGenerator[str]:
        first_s = time.monotonic() - arrived
        event, is_over = first, False
        try:
            while isinstance(event, Told):
                piece = event.piece
                if piece.text or piece.token_logs:
                    yield _json(answer.piece(event.position, piece.index, piece.text, piece.token_logs))
                event = await anext(rest)
            is_over = True
            self._endpoint.metrics.generated(asked, event, took_s=time.monotonic() - arrived, first_s=first_s)
            for position, result in enumerate(event):
                for sample in result.samples:
                    yield _json(answer.end(position, sample))
            if (last := answer.last(event)) is not None:
                yield _json(last)
            yield "[DONE]"
        except ApiError as error:
            is_over = True
            self._endpoint.metrics.broken(error.status)
            yield json.dumps(error.body())
        finally:
            if not is_over:
                self._endpoint.metrics.hung_up()
            await rest.aclose()


def _json(answer: BaseModel) -> str:
    return answer.model_dump_json(exclude_unset=True)


async def _refused(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _invalid(request: Request, error: Any) -> Response:
    return await _refused(request, of_validation(error.errors()))


async def _failed(request: Request, _: Any) -> Response:
    """A mistake of ours; Serve's log has it, the client is told nothing of our insides."""
    return await _refused(request, ApiError(500, "internal error", type=SERVER, code="internal"))


async def _no_route(request: Request, error: Any) -> Response:
    what = {404: "there is no such path", 405: "this path has no such method"}.get(error.status_code)
    refusal = ApiError(error.status_code, what or "the body can't be read", code="bad_request")
    answer = await _refused(request, refusal)
    answer.headers.update(error.headers or {})
    return answer


def _describe(app: FastAPI, model: str, *, needs_key: bool) -> None:
    """Make the OpenAPI document say what is so: the model, our errors instead of FastAPI's 422, and the key."""
    document = app.openapi()
    for name in ("ChatRequest", "CompletionRequest"):
        document["components"]["schemas"][name]["properties"]["model"]["enum"] = [model]
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            if needs_key:
                operation["security"] = [{"key": []}]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = document
