"""The template stage: a shard's rows in, the same rows with prompt token ids or the reason why there are none.

Owns the order of things: sampling, rendering, chat, encoding, length. Knows nothing of Ray; what each step means is in
`sampling`, `jinja_guard`, `prompts` and `chat_encoder`.

Guarantees:
- one row out per row in, in order, with `rows.prompt_fields()` added; the user's columns are untouched.
- a bad row gets an `error` and never raises; its neighbours get what they would have got without it.
- prompt and `max_tokens` together fit `max_model_len`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.chat_encoder import ChatEncoder, EncodedChat, choose_encoder
from pipeline.errors import RowError, SpecError
from pipeline.jinja_child import Unreadable, python_values
from pipeline.jinja_guard import GuardedRenderer, has_expressions, template_columns
from pipeline.jinja_process import RenderLimits
from pipeline.openai_requests import COLUMNS as REQUEST_COLUMNS
from pipeline.openai_requests import LINE, Refusal, read_request
from pipeline.prompts import Chat, Message, build_chat, row_messages, user_message
from pipeline.rows import MAX_ERROR_CHARS, READ_ERROR, prompt_fields
from pipeline.samplers import Samplers
from pipeline.sampling import row_sampling, sampling_to_json
from pipeline.settings import PromptSettings, SamplingSettings

STAGE = "template"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSettings:
    """All that decides a row's token ids; travels to the workers."""

    prompt: PromptSettings
    sampling: SamplingSettings
    model_dir: str
    """Local directory with the model's config and tokenizer."""
    max_model_len: int
    samplers: Samplers | None = None
    """Columns that each row draws before its prompt is made."""
    limits: RenderLimits = field(default_factory=RenderLimits)
    requests: bool = False
    """Whether rows are lines of OpenAI batch files, which bring prompt and sampling in columns of their own."""


def needed_columns(prompt: PromptSettings, sampling: SamplingSettings) -> set[str]:
    """Return the columns that every input file must have.

    Raises:
        SpecError: a template can't be parsed.
    """
    columns = {column for column in (prompt.messages, sampling.column) if column is not None}
    for text in (prompt.template, prompt.system):
        columns |= template_columns(text) if text is not None else set()
    return columns


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What became of one row: ids with their sampling, or an error."""

    ids: list[int] | None = None
    sampling: str | None = None
    repairs: tuple[str, ...] = ()
    error: RowError | None = None


class TemplateStage:
    """Templates shards; owns a render process when the prompt has Jinja in it. Not thread-safe.

    Making one on the driver, before anything starts, finds what is wrong with model and templates.
    """

    def __init__(self, settings: TemplateSettings) -> None:
        """Load the tokenizer and compile the templates.

        Raises:
            SpecError: the model has no usable chat format, or a template is broken or too expensive to compile.
        """
        self._settings = settings
        self._base_sampling = settings.sampling.model_copy(update={"column": None, "fit": False})
        self._base_json = sampling_to_json(self._base_sampling)
        self._encoder: ChatEncoder = choose_encoder(settings.model_dir, marker_text=settings.prompt.marker_text)
        self._check_examples()
        prompt = settings.prompt
        rendered_system = prompt.system is not None and has_expressions(prompt.system)
        self._system_is_rendered = rendered_system
        templates = [text for text in (prompt.template, prompt.system if rendered_system else None) if text is not None]
        self._renderer = GuardedRenderer(templates, settings.limits) if templates else None

    def close(self) -> None:
        """End the render process."""
        if self._renderer is not None:
            self._renderer.close()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `table` with the columns that samplers draw and those of `rows.prompt_fields()` added."""
        table = self.with_samplers(table)
        prompts = self._prompts(table)
        columns = (
            [prompt.ids for prompt in prompts],
            [prompt.sampling for prompt in prompts],
            [prompt.repairs for prompt in prompts],
            [_error_value(prompt.error) for prompt in prompts],
        )
        for column, values in zip(prompt_fields(), columns, strict=True):
            table = table.append_column(column, pa.array(values, column.type))
        return table

    def with_samplers(self, table: pa.Table) -> pa.Table:
        """Return `table` with the columns that its rows draw, if the job has any."""
        return table if self._settings.samplers is None else self._settings.samplers.add_columns(table)

    def chats(self, table: pa.Table, *, folded: bool = True) -> list[tuple[Message, ...] | None]:
        """Each row's chat as it is before encoding; None for a row that has none. The table is as it was read.

        Without `folded` a system message stays one, also where the model has no place for it.
        """
        table = self.with_samplers(table)
        chats = _column(table, self._settings.prompt.messages)
        rendered = self._renderer.render(table) if self._renderer is not None else [[]] * table.num_rows
        found: list[tuple[Message, ...] | None] = []
        for messages, texts in zip(chats, rendered, strict=True):
            try:
                if isinstance(texts, RowError):
                    raise texts
                found.append(self._chat(_readable(messages, "bad_messages"), texts, folded=folded).messages)
            except RowError:
                found.append(None)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return a prompt as the model sees it, for a preview."""
        return self._encoder.decode(ids)

    def _prompts(self, table: pa.Table) -> list[_Prompt]:
        unread = table.column(READ_ERROR).to_pylist() if READ_ERROR in table.column_names else [None] * table.num_rows
        ids = _column(table, "custom_id" if self._settings.requests else None)
        prompts = [
            _Prompt(error=_read_error(reason, custom_id)) if reason is not None else None
            for reason, custom_id in zip(unread, ids, strict=True)
        ]
        todo = [index for index, prompt in enumerate(prompts) if prompt is None]
        if len(todo) < table.num_rows:
            table = table.take(pa.array(todo, pa.int64()))
        done = self._sound_prompts(table)
        return [prompt if prompt is not None else next(done) for prompt in prompts]

    def _sound_prompts(self, table: pa.Table) -> Iterator[_Prompt]:
        settings = self._settings
        if settings.requests:
            for line in zip(*(_column(table, name) for name in (*REQUEST_COLUMNS, LINE)), strict=True):
                yield _contained(partial(self._request_prompt, *line))
            return
        overrides = _column(table, settings.sampling.column)
        chats = _column(table, settings.prompt.messages)
        rendered = self._renderer.render(table) if self._renderer is not None else [[]] * table.num_rows
        for row in zip(overrides, chats, rendered, strict=True):
            yield _contained(partial(self._prompt, *row))

    def _prompt(self, override: Any, messages: Any, texts: list[str] | RowError) -> _Prompt:
        if isinstance(texts, RowError):
            raise texts
        sampling = row_sampling(self._base_sampling, _readable(override, "bad_sampling"))
        return self._encoded(self._chat(_readable(messages, "bad_messages"), texts), sampling)

    def _request_prompt(self, custom_id: Any, method: Any, url: Any, body: Any, line: int) -> _Prompt:
        """The prompt of a line of an OpenAI batch file; what is wrong with it names the line."""
        try:
            request = read_request(custom_id, method, url, body)
            if isinstance(request, Refusal):
                raise RowError(request.kind, request.message, STAGE)
            sampling = row_sampling(self._base_sampling, request.sampling)
            if request.prompt is not None:
                return self._encoded(_raw(request.prompt), sampling, encode=self._encode_raw)
            chat = self._chat(request.messages, [])
            return self._encoded(replace(chat, repairs=(*request.repairs, *chat.repairs)), sampling)
        except RowError as error:
            raise RowError(error.kind, f"line {line}: {error.message}", error.stage) from error

    def _encode_raw(self, messages: Sequence[Message]) -> EncodedChat:
        return self._encoder.encode_text(messages[0].content)

    def _encoded(
        self,
        chat: Chat,
        sampling: SamplingSettings,
        *,
        encode: Callable[[Sequence[Message]], EncodedChat] | None = None,
    ) -> _Prompt:
        """Encode a chat, or with an `encode` of another kind what that takes, and make it fit."""
        least = self._least_tokens(chat)
        if least is not None:
            self._fit(sampling, least, exact=False)
        encoded = (encode or self._encoder.encode)(chat.messages)
        sampling = self._fit(sampling, len(encoded.ids), exact=True)
        text = self._base_json if sampling is self._base_sampling else sampling_to_json(sampling)
        return _Prompt(ids=encoded.ids, sampling=text, repairs=(*chat.repairs, *encoded.repairs))

    def _chat(self, messages: Any, texts: list[str], *, folded: bool = True) -> Chat:
        prompt = self._settings.prompt
        system = texts[-1] if self._system_is_rendered else prompt.system
        turns = row_messages(messages) if prompt.template is None else user_message(texts[0])
        return build_chat(turns, prompt, system=system, fold_system=folded and self._encoder.folds_system)

    def _least_tokens(self, chat: Chat) -> int | None:
        """A lower bound of the prompt's tokens without encoding it: a 1 MB prompt must not cost its tokenization."""
        if self._encoder.max_chars_per_token is None:
            return None
        return sum(len(message.content) for message in chat.messages) // self._encoder.max_chars_per_token

    def _fit(self, sampling: SamplingSettings, num_tokens: int, *, exact: bool) -> SamplingSettings:
        """Return `sampling` with `max_tokens` such that prompt and completion fit, as far as the job allows that."""
        limit = self._settings.max_model_len
        room = limit - num_tokens
        if sampling.max_tokens <= room:
            return sampling
        if self._settings.sampling.fit and room >= 1:
            return sampling.model_copy(update={"max_tokens": room, "min_tokens": min(sampling.min_tokens, room)})
        wanted = 1 if self._settings.sampling.fit else sampling.max_tokens
        size = f"{num_tokens} tokens" if exact else f"at least {num_tokens} tokens"
        cure = "shorten it or raise model.max_model_len"
        if not self._settings.sampling.fit and room >= 1:
            cure += ", lower sampling.max_tokens, or set sampling.fit: true"
        message = f"the prompt has {size}, which with max_tokens {wanted} is more than max_model_len {limit}; {cure}"
        raise RowError("prompt_too_long", message, STAGE)

    def _check_examples(self) -> None:
        """Encode the spec's own examples once, so that what is wrong with them isn't reported row by row."""
        for number, example in enumerate(self._settings.prompt.examples):
            try:
                turns = user_message(example.user)
                build_chat([*turns], self._settings.prompt, system=None, fold_system=self._encoder.folds_system)
                self._encoder.encode(turns)
                self._encoder.encode(user_message(example.assistant))
            except RowError as error:
                raise SpecError(f"prompt.examples[{number}]: {error.message}") from error


_current: list[tuple[TemplateSettings, TemplateStage]] = []


def template_shard(table: pa.Table, settings: TemplateSettings) -> pa.Table:
    """Template one shard; a worker process keeps its tokenizer and render process from one shard to the next."""
    if not _current or _current[0][0] != settings:
        for _, stage in _current:
            stage.close()
        _current[:] = [(settings, TemplateStage(settings))]
    return _current[0][1](table)


def _contained(make: Callable[[], _Prompt]) -> _Prompt:
    try:
        return make()
    except RowError as error:
        return _Prompt(error=error)
    except Exception as error:  # noqa: BLE001  the row boundary: one row must not take its shard along
        return _Prompt(error=RowError("template_error", f"{type(error).__name__}: {error}", STAGE))


def _raw(text: str) -> Chat:
    """A text to be continued as it is, as one message without a chat around it."""
    if not text:
        raise RowError("empty_prompt", "the prompt is missing or empty; give a text to continue", STAGE)
    return Chat((Message("user", text),), ())


def _read_error(reason: str, custom_id: Any) -> RowError:
    """Of lines that can be read, and so have an id, reading refuses only those whose id is taken."""
    return RowError("bad_row", reason, "read") if custom_id is None else RowError("duplicate_custom_id", reason, "read")


def _column(table: pa.Table, name: str | None) -> list[Any]:
    if name is None:
        return [None] * table.num_rows
    return python_values(table.column(name))


def _readable(value: Any, kind: str) -> Any:
    if isinstance(value, Unreadable):
        raise RowError(kind, f"the value can't be read: {value.message}", STAGE)
    return value


def _error_value(error: RowError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    message = error.message.encode("utf-8", "replace").decode()[:MAX_ERROR_CHARS]
    return {"kind": error.kind, "message": message, "stage": error.stage, "attempts": 0}
