"""A job: one YAML file as one frozen model, put together from the settings of pipeline and cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from cluster.settings import FleetSettings
from pipeline.settings import (
    DriftSettings,
    InputSettings,
    LabelSettings,
    LimitSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RoutingSettings,
    SamplingSettings,
    Settings,
)
from pipeline.synthesis_settings import SynthesisSettings


class JobSpec(Settings):
    """A job: one YAML file, validated."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Letters, digits, dot, dash and underscore; at most 64."""
    model: ModelSettings
    input: InputSettings
    kind: Literal["complete", "label", "synthesize"] = "complete"
    """`complete` generates text; `label` chooses among `label.choices`; `synthesize` makes records without doubles."""
    label: LabelSettings | None = None
    """Of `kind: label` only; the prompt is made from it."""
    synthesize: SynthesisSettings | None = None
    """Of `kind: synthesize` only."""
    prompt: PromptSettings
    sampling: SamplingSettings = SamplingSettings()
    output: OutputSettings
    routing: RoutingSettings = RoutingSettings()
    limits: LimitSettings = LimitSettings()
    drift: DriftSettings = DriftSettings()
    fleet: FleetSettings = FleetSettings()
    _files: tuple[str, ...] = PrivateAttr(())

    @property
    def files(self) -> tuple[str, ...]:
        """Python files that the spec names; what they say is in it already."""
        return self._files

    def read_from(self, files: Sequence[str]) -> JobSpec:
        """The same spec, for whose schemas these files were read."""
        spec = self.model_copy()
        spec._files = tuple(files)
        return spec
