"""What engines said, in the `openai` package's own types: whole answers and the chunks of streams. Pure."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion import Completion
from openai.types.completion_choice import CompletionChoice, Logprobs
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails

from cluster.serve_prompts import Asked
from pipeline.engine import TokenLog
from pipeline.replica_answers import ReducedSample, RowResult


class Answer:
    """The answer to one request, whole or in chunks; all of them have its id and time."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        prefix = "chatcmpl-" if asked.is_chat else "cmpl-"
        self._head: dict[str, Any] = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        firsts = [0]
        for request in asked.requests:
            firsts.append(firsts[-1] + request.sampling.n)
        self._firsts = firsts
        """Index of each prompt's first choice."""
        self._begun: set[int] = set()
        self._num_chars: dict[int, int] = {}
        """Of each choice so far, for the offsets that completions' log-probabilities have."""

    def whole(self, results: Sequence[RowResult]) -> ChatCompletion | Completion:
        """The answer in one piece."""
        choices = [
            self._choice(self._firsts[position] + sample.index, sample)
            for position, result in enumerate(results)
            for sample in result.samples
        ]
        extra = self._extra(results)
        usage = self.usage(results)
        if self._asked.is_chat:
            return ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self._head, **extra)
        return Completion(object="text_completion", choices=choices, usage=usage, **self._head, **extra)

    def piece(self, position: int, index: int, text: str, logs: Sequence[TokenLog]) -> ChatCompletionChunk | Completion:
        """What one sample of the prompt at this position has gained."""
        return self._chunk(self._firsts[position] + index, text, logs, None)

    def end(self, position: int, sample: ReducedSample) -> ChatCompletionChunk | Completion:
        """A sample's end."""
        return self._chunk(self._firsts[position] + sample.index, "", (), sample.finish_reason)

    def last(self, results: Sequence[RowResult]) -> ChatCompletionChunk | Completion | None:
        """What comes after all samples' ends; None for nothing."""
        extra = self._extra(results)
        if not extra and not self._asked.include_usage:
            return None
        usage: dict[str, Any] = {"usage": self.usage(results)} if self._asked.include_usage else {}
        if self._asked.is_chat:
            return ChatCompletionChunk(object="chat.completion.chunk", choices=[], **usage, **self._head, **extra)
        return Completion(object="text_completion", choices=[], **usage, **self._head, **extra)

    def usage(self, results: Sequence[RowResult]) -> CompletionUsage:
        """Tokens in and out; a prompt counts once, however many samples it has."""
        num_in = sum(len(request.prompt_token_ids) for request in self._asked.requests)
        num_out = sum(sample.num_generated_tokens for result in results for sample in result.samples)
        cached = PromptTokensDetails(cached_tokens=sum(result.num_cached_tokens for result in results))
        return CompletionUsage(
            prompt_tokens=num_in,
            completion_tokens=num_out,
            total_tokens=num_in + num_out,
            prompt_tokens_details=cached,
        )

    def _choice(self, index: int, sample: ReducedSample) -> Any:
        finish: Any = sample.finish_reason
        logs = sample.token_logs or () if self._asked.with_logs else None
        if self._asked.is_chat:
            message = ChatCompletionMessage(role="assistant", content=sample.text)
            content = None if logs is None else ChoiceLogprobs(content=[_chat_log(log) for log in logs])
            return Choice(index=index, finish_reason=finish, message=message, logprobs=content)
        columns = None if logs is None else self._columns(index, logs)
        return CompletionChoice(index=index, finish_reason=finish, text=sample.text, logprobs=columns)

    def _chunk(self, index: int, text: str, logs: Sequence[TokenLog], finish: Any) -> ChatCompletionChunk | Completion:
        with_logs = self._asked.with_logs and finish is None
        if not self._asked.is_chat:
            columns = self._columns(index, logs) if with_logs else None
            # OpenAI's type says that a choice always has a reason to end; its own streams say null before that.
            choice = CompletionChoice.model_construct(index=index, text=text, finish_reason=finish, logprobs=columns)
            return Completion.model_construct(object="text_completion", choices=[choice], **self._head)
        delta = ChoiceDelta(content=text) if finish is None else ChoiceDelta()
        if index not in self._begun:
            self._begun.add(index)
            delta = ChoiceDelta(role="assistant", content=text)
        content = ChunkLogprobs(content=[_chat_log(log) for log in logs]) if with_logs else None
        chunk = ChunkChoice(index=index, delta=delta, finish_reason=finish, logprobs=content)
        return ChatCompletionChunk(object="chat.completion.chunk", choices=[chunk], **self._head)

    def _columns(self, index: int, logs: Sequence[TokenLog]) -> Logprobs:
        offsets = []
        for log in logs:
            offsets.append(self._num_chars.get(index, 0))
            self._num_chars[index] = offsets[-1] + len(log.text)
        return Logprobs(
            tokens=[log.text for log in logs],
            token_logprobs=[log.logprob for log in logs],
            top_logprobs=[dict(reversed(log.top)) for log in logs],  # of two equal texts the likelier one
            text_offset=offsets,
        )

    def _extra(self, results: Sequence[RowResult]) -> dict[str, Any]:
        if not self._asked.routing:
            return {}
        found = [
            _routing(self._firsts[position] + sample.index, sample)
            for position, result in enumerate(results)
            for sample in result.samples
        ]
        return {"tramontane": {"routing": found}}


def _chat_log(log: TokenLog) -> ChatCompletionTokenLogprob:
    top = [TopLogprob(token=text, bytes=list(text.encode()), logprob=logprob) for text, logprob in log.top]
    return ChatCompletionTokenLogprob(
        token=log.text, bytes=list(log.text.encode()), logprob=log.logprob, top_logprobs=top
    )


def _routing(index: int, sample: ReducedSample) -> dict[str, Any]:
    """One choice's counts as in a run's column `routing`; without them when the engine's ids were impossible."""
    routing = sample.routing
    if routing is None:
        return {"index": index}
    return {
        "index": index,
        "num_layers": routing.moe.num_layers,
        "num_experts": routing.moe.num_experts,
        "top_k": routing.moe.top_k,
        "prompt_expert_counts": routing.prompt_counts.tolist(),
        "completion_expert_counts": routing.completion_counts.tolist(),
        "repeat_first": routing.repeat_first,
        "repeat_any": routing.repeat_any,
    }
