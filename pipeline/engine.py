"""What an inference engine is to the pipeline: requests in, finished completions out, one step at a time.

The replica owns an engine from a single thread. Nothing here imports vLLM; `vllm_engine` implements this protocol for
production and the scripted engine under `tests/` implements it for fault tests. What travels by the million between
processes (requests, timings) has no slots: to pickle a frozen class with slots runs Python code for every field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.choices import ChoiceTree
from pipeline.settings import SamplingSettings


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Layers that route, experts per layer, and experts chosen per token and layer."""

    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine turned out to be once loaded."""

    max_num_seqs: int
    max_model_len: int
    moe: MoeShape | None
    """None for a dense model, or when the engine doesn't capture routing."""
    versions: dict[str, str]
    lookahead: int = 0
    """Requests that it should hold beyond those it can run, because it may begin the next before it is asked again."""


TokenIds = Sequence[int] | NDArray[np.int32]
"""An array takes 4 bytes a token, where a list takes 36: a run has thousands of prompts open."""


def plain_ids(token_ids: TokenIds) -> list[int]:
    """As a list of Python's own integers."""
    return [int(each) for each in token_ids] if isinstance(token_ids, Sequence) else token_ids.tolist()


@dataclass(frozen=True)
class Request:
    """One row on its way to an engine."""

    request_id: str
    """Unique among the unfinished requests of one engine."""
    prompt_token_ids: TokenIds
    sampling: SamplingSettings
    seed: int | None
    """Seed of sample 0; sample i uses seed + i."""
    priority: int = 0
    """Lower runs first."""
    timeout_s: float = 600.0
    """Longest time inside the engine."""
    keep_expert_ids: bool = False
    """Whether to return each token's expert ids as bytes."""
    choices: ChoiceTree | None = None
    """Answers to choose among, instead of generating: how probable each is, and the most probable one as the sample."""
    stream: bool = False
    """Whether its text comes out piece by piece too, before the whole."""
    num_top_logs: int | None = None
    """Log-probabilities of each generated token and of so many of the likeliest in its place; None for none."""


@dataclass(frozen=True)
class Timing:
    """Seconds, measured by the engine: waiting, arrival to first token, arrival to last token."""

    queue_s: float
    first_token_s: float
    total_s: float


UNKNOWN_TIMING = Timing(0.0, 0.0, 0.0)

ONLINE_PRIORITY = -100
"""Of requests that somebody waits for: before those of any run."""


@dataclass(frozen=True)
class TokenLog:
    """One generated token and its log-probability, with the likeliest tokens in its place, likeliest first."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one sample of a streamed request has gained since the last piece."""

    request_id: str
    index: int
    """Of the sample."""
    text: str
    num_tokens: int
    token_logs: tuple[TokenLog, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated sample."""

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str
    """`stop` or `length`."""
    stop_reason: str | None
    cumulative_logprob: float | None
    routed_experts: NDArray[np.integer] | None
    """[prompt + generated - 1, layers, top_k] expert ids, first choice first; None when not captured."""
    choice_logs: tuple[float, ...] | None = None
    """Log-probability of each of the request's choices, in their order; None for a request without."""
    token_logs: tuple[TokenLog, ...] | None = None
    """Of each generated token, when the request asks for them."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request: all of its samples, in index order."""

    request_id: str
    samples: tuple[Sample, ...]
    num_cached_tokens: int
    timing: Timing


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that the engine gave up on; the engine itself goes on."""

    request_id: str
    kind: str
    message: str


class Engine(Protocol):
    """Synchronous engine, driven by one thread.

    Guarantees:
    - `add` raises RequestRefused for a request that breaks its rules, and the engine is as before.
    - every accepted request comes out of `step` exactly once, unless aborted.
    - the pieces of a streamed request come before it, and their texts make up its samples' texts; no others have any.
    - an exception out of `step` means that the engine is dead.
    """

    @property
    def info(self) -> EngineInfo:
        """What was loaded."""
        ...

    @property
    def num_sequences(self) -> int:
        """Sequences that its unfinished requests take: their samples that aren't done; one for a choice."""
        ...

    def add(self, request: Request) -> None:
        """Queue one request."""
        ...

    def step(self) -> Sequence[Completion | Failure | Piece]:
        """Advance all running requests and return those that finished, and pieces of those that are streamed."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests; unknown ids are ignored."""
        ...

    def close(self) -> None:
        """Release processes and memory."""
        ...
