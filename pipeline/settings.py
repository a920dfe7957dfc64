"""What a run can be told, as frozen pydantic models; the text under a field is its documentation everywhere.

Light on purpose: the command line validates a spec without importing Ray, torch, transformers or vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Frozen, and strict about unknown fields: a misspelt key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def contradiction(message: str, *, at: str) -> PydanticCustomError:
    """Two fields of one model that can't both hold; `at` names the one to point at, or is empty."""
    return PydanticCustomError("contradiction", "{message}", {"message": message, "at": at})


class ModelSettings(Settings):
    """Which model, and how the engine loads it."""

    source: str
    """`tiny` (made on the spot, random weights), a local path, an fsspec URL, or a Hugging Face id."""
    revision: str | None = None
    """Commit of a Hugging Face repository. Pin it: a moving branch changes results."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Arithmetic of weights and activations."""
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    """Longest prompt plus completion, in tokens. Ask for what the job needs, not for what the model could do."""
    engine_args: dict[str, Any] = {}
    """Passed to vLLM's engine unchanged, e.g. `{gpu_memory_utilization: 0.92, quantization: fp8}`."""


class InputSettings(Settings):
    """Which rows."""

    path: str | list[str]
    """A file, directory, glob or a list of them: Parquet or JSONL; local, `s3://`, `gs://` or `abfs://`."""
    id: str | None = None
    """Your own id column: checked for nulls and duplicates. Rows are known by (input_file, input_row) regardless."""
    limit: Annotated[int, Field(ge=0)] | None = None
    """Only the first so many rows, in file order."""


class Example(Settings):
    """One few-shot exchange, literal text."""

    user: str
    """What the user said."""
    assistant: str
    """What the assistant should have answered."""


class PromptSettings(Settings):
    """How a row becomes a chat prompt. Exactly one of `messages` and `template`."""

    messages: str | None = None
    """Column that holds a chat: a list of {role, content}, or the same as JSON text."""
    template: str | None = None
    """Jinja template over the row's columns, rendered to one user message. Sandboxed; an unknown column is an error."""
    system: str | None = None
    """System message put before every chat; a Jinja template too."""
    examples: list[Example] = []
    """Few-shot exchanges put before the first user message, literal text."""
    safe_prompt: bool = False
    """Put Mistral's official safety prompt before everything else."""
    marker_text: Literal["escape", "reject", "allow"] = "escape"
    """What to do with a row whose text contains `[INST]` or `[/INST]`, Mixtral 8x7B's own plain-text markers."""

    @model_validator(mode="after")
    def _exactly_one_source(self) -> PromptSettings:
        if (self.messages is None) == (self.template is None):
            at = "" if self.template is None else "template"
            raise contradiction(
                "give exactly one of `messages` (a column holding a chat) and `template` (Jinja text)", at=at
            )
        return self


class SamplingSettings(Settings):
    """How tokens are drawn. A row may override any of these through `column`."""

    n: Annotated[int, Field(ge=1, le=1024)] = 1
    """Samples per row; each becomes one output row."""
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """Nucleus mass."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among the k likeliest tokens; 0 means all."""
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    """OpenAI's presence penalty."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    """OpenAI's frequency penalty."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0
    """Multiplicative penalty on tokens already seen; 1 is none."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Most tokens to generate per sample; a sample that reaches it has status `truncated`."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Least tokens before end-of-sequence is allowed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Base of every sample's own seed; null draws a fresh one per run, and results then can't be reproduced."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion; the text is cut before them."""
    ignore_eos: bool = False
    """Go on past end-of-sequence up to `max_tokens` (for measurements)."""
    logprob: bool = False
    """Fill `cumulative_logprob`; costs a little speed."""
    fit: bool = False
    """Let `max_tokens` shrink so that a long prompt fits `max_model_len`; else such a row fails: `prompt_too_long`."""
    column: str | None = None
    """Column with per-row overrides as a JSON object, e.g. `{"temperature": 0, "max_tokens": 8}`; null means none."""

    @model_validator(mode="after")
    def _min_within_max(self) -> SamplingSettings:
        if self.min_tokens > self.max_tokens:
            raise contradiction(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower it", at="min_tokens"
            )
        return self


class OutputSettings(Settings):
    """Where results go and what an existing output means."""

    path: str
    """Directory or URL; one run owns it at a time."""
    keep: Literal["all", "none"] | list[str] = "all"
    """Which of the input's columns to carry into the output."""
    resume: Literal["if_possible", "always", "never"] = "if_possible"
    """Continue what is there (same fingerprint only), insist on it, or insist on an empty output."""


class RoutingSettings(Settings):
    """What to record of the experts' selection."""

    level: Literal["off", "counts", "tokens"] = "counts"
    """`counts`: per row and per run; `tokens`: also each token's expert ids, as bytes; `off`: nothing is captured."""
    slice_by: str | None = None
    """Column whose values get separate totals in `routing/`, e.g. a language or a domain."""


class LimitSettings(Settings):
    """When to give up."""

    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The run stops, exit 1, as soon as more than this share of all rows has failed."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time one request may take inside an engine."""
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Attempts per row before it is `failed`."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A replica with work but no progress for so long is killed and replaced."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    """After an interrupt, how long to wait for shards already begun."""


class PoolSettings(Settings):
    """Replicas of one kind."""

    gpu: str = "cpu"
    """GPU type, or `cpu`."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Engines to start."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """GPUs (or CPU workers) per engine."""
    engine_args: dict[str, Any] = {}
    """Laid over `model.engine_args` for this pool."""


class FleetSettings(Settings):
    """What runs the model."""

    pools: Annotated[list[PoolSettings], Field(min_length=1)] = [PoolSettings()]
    """One entry per GPU type."""


class JobSpec(Settings):
    """A job: one YAML file, validated."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Letters, digits, dot, dash and underscore; at most 64."""
    model: ModelSettings
    input: InputSettings
    prompt: PromptSettings
    sampling: SamplingSettings = SamplingSettings()
    output: OutputSettings
    routing: RoutingSettings = RoutingSettings()
    limits: LimitSettings = LimitSettings()
    fleet: FleetSettings = FleetSettings()
