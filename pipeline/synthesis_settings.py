"""What a synthesis can be told: what prompts draw, how often a broken record is asked for again, what is dropped."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.settings import Settings, contradiction

TALK = "conversation"
"""What prompts for the user's next message know the talk so far as."""


class SamplerSettings(Settings):
    """A column that each input row draws for itself, always the same. Exactly one of its fields."""

    category: list[str] | dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Values, equally likely, or a mapping from each to its weight."""
    persona: str | None = None
    """Text file, local or URL, with a value on each line."""
    range: Annotated[list[Annotated[int, Field(gt=-(2**62), lt=2**62)]], Field(min_length=2, max_length=2)] | None = (
        None
    )
    """Two integers: the least and the greatest."""

    @model_validator(mode="after")
    def _exactly_one(self) -> SamplerSettings:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise contradiction("give exactly one of `category`, `persona` and `range`", at="")
        if not (self.category is None or self.category):
            raise contradiction("it is empty, so there is nothing to draw", at="category")
        if self.range is not None and self.range[0] > self.range[1]:
            raise contradiction(f"{self.range[0]} is more than {self.range[1]}; swap them", at="range")
        return self


class FilterSettings(Settings):
    """Which records to keep, by their text: of a JSON record, all its strings."""

    min_chars: Annotated[int, Field(ge=0)] = 0
    """Shorter ones are dropped."""
    max_chars: Annotated[int, Field(ge=1)] | None = None
    """Longer ones are dropped."""
    matches: str | None = None
    """Regular expression (RE2) that must be found."""
    rejects: str | None = None
    """Regular expression (RE2) that must not be found."""
    languages: list[Annotated[str, Field(pattern="^[a-z]{2,3}$")]] | None = None
    """ISO 639 codes, e.g. [de, fr]; a record that py3langid finds in another language is dropped. null: any."""


class DuplicateSettings(Settings):
    """Which records are too much like an earlier one."""

    exact: bool = True
    """Drop records that are equal to an earlier one, upper case and spaces aside."""
    near: Annotated[float, Field(ge=0.5, le=1)] | None = 0.8
    """Drop records that share at least this much (Jaccard, runs of five characters) with an earlier one; null: none."""


Score = Annotated[str, Field(pattern="^-?[0-9]{1,4}$")]


class JudgeSettings(Settings):
    """A second prompt about each record that is left, answered with one of some scores."""

    instructions: str
    """What to judge, in a sentence or a paragraph; a Jinja template over the record's columns. The record follows."""
    scores: Annotated[dict[Score, str], Field(min_length=2)]
    """The scores, whole numbers, each with what it means."""
    keep_from: int
    """Least score of a record that is kept."""

    @model_validator(mode="after")
    def _separates(self) -> JudgeSettings:
        least, greatest = min(map(int, self.scores)), max(map(int, self.scores))
        if not least < self.keep_from <= greatest:
            message = f"{self.keep_from} keeps all or none of the scores {least} to {greatest}; give one between"
            raise contradiction(message, at="keep_from")
        return self


class ConversationSettings(Settings):
    """How a record goes on after the first answer, user and assistant by turns."""

    turns: Annotated[int, Field(ge=2, le=20)]
    """Messages of the user in all; the first is the job's prompt."""
    user: str
    """What the model is asked for the user's next message: a Jinja template over the record's columns and
    `conversation`, the talk so far."""


class SynthesisSettings(Settings):
    """What a synthesis (`kind: synthesize`) adds to a prompt over seed rows."""

    samplers: dict[str, SamplerSettings] = {}  # noqa: RUF012  a pydantic model, which copies it
    """Columns drawn for each row, to be used in `prompt.template`."""
    sampler_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """What they are drawn from; another seed draws others."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """How often an invalid or truncated record is asked for again, the error shown to the model."""
    conversation: ConversationSettings | None = None
    """Makes each record a conversation of several turns."""
    filters: FilterSettings = FilterSettings()
    """What a record must be like to be kept."""
    duplicates: DuplicateSettings = DuplicateSettings()
    """Which records are doubles."""
    judge: JudgeSettings | None = None
    """What gives each record that is left a score, and which are kept then."""
