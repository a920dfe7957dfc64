"""A request's body to the pipeline's own requests: the same reading, the same encoder, the same rules as a run's rows.

Knows nothing of HTTP or Ray. Invariant: what comes out equals what a run makes of a row with that chat and sampling.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.serve_errors import ApiError, of_row
from cluster.serve_settings import ServeSettings
from pipeline.chat_encoder import choose_encoder
from pipeline.engine import ONLINE_PRIORITY, Request
from pipeline.errors import RowError
from pipeline.openai_requests import CHAT, COMPLETIONS, Refusal, read_request
from pipeline.prompts import build_chat, row_messages
from pipeline.sampling import row_sampling
from pipeline.settings import PromptSettings, SamplingSettings

MAX_SAMPLES = 128
MAX_STOPS, MAX_STOP_CHARS = 16, 1000
MAX_TOP_LOGS = 20
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, for /v1/completions; a chat may go on to the end of the context."""
_SEEDS = 2**62
_NOT_SAMPLING = ("stream", "stream_options", "logprobs", "top_logprobs", "safe_prompt", "tramontane", "prompt")
_SHORTER = "shorten the prompt or lower `max_tokens`"


@dataclass(frozen=True, slots=True)
class Asked:
    """What one HTTP request asks for."""

    requests: tuple[Request, ...]
    """One for each prompt; their samples in this order are the answer's choices."""
    is_chat: bool
    stream: bool
    include_usage: bool
    """Whether a stream ends with what it took."""
    routing: bool
    with_logs: bool

    @property
    def num_samples(self) -> int:
        """Of all prompts."""
        return sum(request.sampling.n for request in self.requests)


class PromptMaker:
    """Makes prompts for one model. Not thread-safe: the encoder keeps what it has learnt of the model's template."""

    def __init__(self, model_dir: str, *, max_model_len: int, vocab_size: int, settings: ServeSettings) -> None:
        """Load the tokenizer.

        Raises:
            SpecError: the model has no usable chat format.
        """
        self._encoder = choose_encoder(model_dir, marker_text=settings.marker_text)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._timeout_s = settings.request_timeout_s

    def chat(self, body: Any) -> Asked:
        """Of a `serve_types.ChatRequest`.

        Raises:
            ApiError: it can't be answered, and why.
        """
        given = body.model_dump(exclude_unset=True, exclude_none=True)
        read = _read(given, CHAT)
        with_logs = bool(body.logprobs)
        if body.top_logprobs and not with_logs:
            raise ApiError(400, "`top_logprobs` needs `logprobs: true`", code="invalid_value", param="top_logprobs")
        try:
            prompt = PromptSettings(messages="messages", safe_prompt=bool(body.safe_prompt))
            turns = row_messages(read.messages)
            chat = build_chat(turns, prompt, system=None, fold_system=self._encoder.folds_system)
            self._check_least(sum(len(message.content) for message in chat.messages))
            ids = self._encoder.encode(chat.messages).ids
        except RowError as error:
            raise of_row(error) from error
        num_logs = (body.top_logprobs or 0) if with_logs else None
        return self._asked(body, [ids], read.sampling, num_logs, room_only=True)

    def completion(self, body: Any) -> Asked:
        """Of a `serve_types.CompletionRequest`.

        Raises:
            ApiError: it can't be answered, and why.
        """
        if body.safe_prompt:
            raise ApiError(400, "`safe_prompt` is for chats", code="unsupported_parameter", param="safe_prompt")
        read = _read(body.model_dump(exclude_unset=True, exclude_none=True), COMPLETIONS)
        prompts = [self._prompt_ids(prompt) for prompt in _prompts(body.prompt)]
        return self._asked(body, prompts, read.sampling, body.logprobs, room_only=False)

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_least(len(prompt))
            try:
                return self._encoder.encode_text(prompt).ids
            except RowError as error:
                raise of_row(error) from error
        wrong = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            message = f"token id {wrong} is none of the model's {self._vocab_size}"
            raise ApiError(400, message, code="invalid_value", param="prompt")
        return prompt

    def _check_least(self, num_chars: int) -> None:
        """Refuse a text that can't fit before it costs its tokenization."""
        longest = self._encoder.max_chars_per_token
        least = num_chars // longest if longest else 0
        if least >= self._max_model_len:
            raise _too_long(f"at least {least}", 1, self._max_model_len)

    def _asked(
        self, body: Any, prompts: Sequence[list[int]], sampling: str | None, num_logs: int | None, *, room_only: bool
    ) -> Asked:
        if num_logs is not None and not 0 <= num_logs <= MAX_TOP_LOGS:
            message = f"at most {MAX_TOP_LOGS} of the likeliest tokens can be told, and no fewer than 0"
            raise ApiError(400, message, code="invalid_value", param="logprobs")
        options = body.stream_options or {}
        if options and not body.stream:
            raise ApiError(400, "`stream_options` needs `stream: true`", code="invalid_value", param="stream_options")
        override = json.loads(sampling) if sampling is not None else {}
        seed = override.pop("seed", None)
        requests = [
            Request(
                request_id="",  # the dispatcher names attempts
                prompt_token_ids=ids,
                sampling=self._sampling(override, len(ids), room_only=room_only),
                seed=secrets.randbelow(_SEEDS) if seed is None else seed % _SEEDS,
                priority=ONLINE_PRIORITY,
                timeout_s=self._timeout_s,
                stream=bool(body.stream),
                num_top_logs=num_logs,
            )
            for ids in prompts
        ]
        asked = Asked(
            requests=tuple(requests),
            is_chat=room_only,
            stream=bool(body.stream),
            include_usage=bool(options.get("include_usage")),
            routing=body.tramontane is not None and body.tramontane.routing,
            with_logs=num_logs is not None,
        )
        if asked.num_samples > MAX_SAMPLES:
            message = f"{asked.num_samples} samples are more than the {MAX_SAMPLES} that one request may ask for"
            raise ApiError(400, message, code="invalid_value", param="n")
        return asked

    def _sampling(self, override: dict[str, Any], num_tokens: int, *, room_only: bool) -> SamplingSettings:
        room = self._max_model_len - num_tokens
        if num_tokens < 1:
            raise ApiError(400, "the prompt is empty", code="empty_prompt", param="prompt")
        if room < 1:
            raise _too_long(str(num_tokens), 1, self._max_model_len)
        default = room if room_only else min(room, DEFAULT_COMPLETION_TOKENS)
        try:
            sampling = row_sampling(SamplingSettings(), json.dumps({"max_tokens": default, **override}))
        except RowError as error:
            raise of_row(error) from error
        if sampling.max_tokens > room:
            raise _too_long(str(num_tokens), sampling.max_tokens, self._max_model_len)
        if len(sampling.stop) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in sampling.stop):
            message = f"`stop` may have at most {MAX_STOPS} texts of {MAX_STOP_CHARS} characters"
            raise ApiError(400, message, code="invalid_value", param="stop")
        return sampling


def _read(given: dict[str, Any], url: str) -> Any:
    """As `openai_requests.read_request` reads a line of a batch file."""
    body = {name: value for name, value in given.items() if name not in _NOT_SAMPLING}
    try:
        read = read_request("online", "POST", url, json.dumps(body))
    except (ValueError, RecursionError):  # a number or a nesting that JSON text can't carry
        raise ApiError(400, "the body holds a value that JSON doesn't have", code="invalid_value") from None
    if isinstance(read, Refusal):
        raise ApiError(400, read.message, code=read.code, param=read.param)
    return read


def _prompts(prompt: Any) -> list[Any]:
    """One or several prompts, each a text or token ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt or len(prompt) > MAX_SAMPLES:
        message = f"`prompt` must be a text, token ids, or a list of 1 to {MAX_SAMPLES} of these"
        raise ApiError(400, message, code="invalid_value", param="prompt")
    return list(prompt)


def _too_long(num_tokens: str, max_tokens: int, limit: int) -> ApiError:
    message = (
        f"the prompt has {num_tokens} tokens, which with max_tokens {max_tokens} is more than the model's "
        f"{limit}; {_SHORTER}"
    )
    return ApiError(400, message, code="context_length_exceeded", param="messages")
