"""What a run can be told, as frozen pydantic models; the text under a field is its documentation everywhere.

Light on purpose: the command line validates a spec without importing Ray, torch, transformers or vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.json_schemas import check_json_schema

TINY, RANDOM = "tiny", "random"
"""Sources of models that come with the program."""


class Settings(BaseModel):
    """Frozen, and strict about unknown fields: a misspelt key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def contradiction(message: str, *, at: str) -> PydanticCustomError:
    """Two fields of one model that can't both hold; `at` names the one to point at, or is empty."""
    return PydanticCustomError("contradiction", "{message}", {"message": message, "at": at})


class ModelSettings(Settings):
    """Which model, and how the engine loads it."""

    source: str
    """`tiny` (comes with the program), `random` (as it is, but with random weights), a local path, an fsspec URL, or a
    Hugging Face id."""
    revision: str | None = None
    """Commit of a Hugging Face repository. Pin it: a moving branch changes results."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Arithmetic of weights and activations."""
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    """Longest prompt plus completion, in tokens. Ask for what the job needs, not for what the model could do."""
    engine_args: dict[str, Any] = {}
    """Passed to vLLM's engine unchanged, e.g. `{gpu_memory_utilization: 0.92, quantization: fp8}`."""


InputFormat = Literal["auto", "openai_batch"]


class InputSettings(Settings):
    """Which rows."""

    path: str | list[str]
    """A file, directory, glob or a list of them: Parquet or JSONL; local, `s3://`, `gs://` or `abfs://`."""
    format: InputFormat = "auto"
    """`auto`: Parquet or JSONL, by extension; `openai_batch`: JSONL of requests as OpenAI's batch API takes them."""
    id: str | None = None
    """Your own id column: checked for nulls and duplicates. Rows are known by (input_file, input_row) regardless."""
    prefix: Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_]*$")] | None = None
    """Of an input that another run wrote: put before the columns that runs add, known by name: `draft_`."""
    limit: Annotated[int, Field(ge=0)] | None = None
    """Only the first so many rows, in file order."""
    new: Literal["all", "since_last_run"] = "all"
    """`since_last_run`: only what no earlier run of this job has; each run gets a folder below `output.path`."""
    new_by: Literal["file", "id", "content", "partition"] = "file"
    """What is known again by the next run: files by path, rows by `id` or by all they hold, or days by `partition`."""
    changed: Literal["ignore", "redo"] = "ignore"
    """What to do about a known file, row or day that isn't as it was: leave its results, or do it again."""
    partition: str | None = None
    """Of `new_by: partition`: the key of the day in paths, `date` in `.../date=2026-11-20/...`. Past days are taken."""
    timezone: str = "UTC"
    """Of `new_by: partition`: where the day must be past."""


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
    """Instead of `messages`, which is then left out: a Jinja template over the row's columns, rendered to one user
    message. Sandboxed; an unknown column is an error."""
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
    json_object: bool = False
    """Every completion is a JSON object, unless `max_tokens` cuts it."""
    json_schema: dict[str, Any] | None = None
    """Every completion is JSON that this JSON schema allows, unless `max_tokens` cuts it. In a spec's file also
    FILE.py:Class, a pydantic model."""
    fit: bool = False
    """Let `max_tokens` shrink so that a long prompt fits `max_model_len`; else such a row fails: `prompt_too_long`."""
    dedupe: Literal["exact", "off"] = "exact"
    """`exact`: rows with equal prompts and equal greedy sampling are run once, and all get the outcome."""
    column: str | None = None
    """Column with per-row overrides as a JSON object, e.g. `{"temperature": 0, "max_tokens": 8}`; null means none."""

    @model_validator(mode="after")
    def _min_within_max(self) -> SamplingSettings:
        if self.min_tokens > self.max_tokens:
            raise contradiction(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower it", at="min_tokens"
            )
        return self

    @property
    def is_json(self) -> bool:
        """Whether completions are made to be JSON."""
        return self.json_object or self.json_schema is not None

    @model_validator(mode="after")
    def _json_can_be_followed(self) -> SamplingSettings:
        if self.json_object and self.json_schema is not None:
            raise contradiction("a schema says already what completions are; leave `json_object` out", at="json_object")
        for name in ("min_tokens", "stop", "ignore_eos") if self.is_json else ():
            if getattr(self, name):
                raise contradiction(f"JSON ends where it is complete; leave `{name}` out", at=name)
        if self.json_schema is not None:
            try:
                check_json_schema(self.json_schema)
            except ValueError as error:
                raise contradiction(str(error), at="json_schema") from None
        return self


class LabelExample(Settings):
    """A text with its true label, shown to the model as an exchange before the row's own."""

    text: str
    """As the column would hold it."""
    label: str | None = None
    """One of the choices."""
    labels: list[str] | None = None
    """With `multi`, those that fit; none with []."""


class LabelSettings(Settings):
    """What a labelling job (`kind: label`) chooses for each row."""

    text: str
    """Column with the text to label."""
    choices: dict[str, str] | list[str]
    """The labels: a list, or a mapping from each to what it means, which the model is told."""
    instructions: str = "Choose the label that fits the text best."
    """What the model is to do, in a sentence or a paragraph."""
    examples: list[LabelExample] = []
    """Texts whose label is known, shown before the row's text."""
    multi: bool = False
    """Any number of labels a row, each with a probability of its own: `labels` instead of `label` in the output."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With `multi`, least probability of a label that is given; null for 0.5."""
    abstain_below: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least probability of the most probable label; below it, `label` is `default`. With `multi`, of the least sure
    decision about a label; below it, `labels` is `[default]`, or null."""
    default: str | None = None
    """What `label` says of a row that isn't sure enough; null means null."""
    review_below: Annotated[float, Field(gt=0, le=1)] | None = None
    """Rows less sure than this are copied to `review/*.parquet` under the output, for a person to look at."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Log-probabilities are divided by it; `tramontane calibrate` says by how much."""

    @property
    def names(self) -> tuple[str, ...]:
        """The labels, in the order given."""
        return tuple(self.choices)


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


class DriftSettings(Settings):
    """From which difference between two runs on `tramontane diff` exits with 1; null for never."""

    label: Annotated[float, Field(ge=0, le=1)] | None = None
    """Jensen-Shannon distance between the two runs' shares of labels: 0 is equal, 1 disjoint."""
    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest difference between the shares of rows below a label confidence (Kolmogorov-Smirnov)."""
    tokens: Annotated[float, Field(ge=0)] | None = None
    """Change of the mean number of input or of generated tokens, 0.2 for a fifth more or less."""
    routing: Annotated[float, Field(ge=0, le=1)] | None = None
    """Jensen-Shannon distance between the two runs' shares of experts, in the layer where it is largest."""


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
