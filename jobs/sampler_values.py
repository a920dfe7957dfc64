"""The samplers of a synthesis with their values, personas read from their files."""

from __future__ import annotations

import hashlib
from typing import Any

from jobs.job_spec import JobSpec
from pipeline.errors import SpecError
from pipeline.samplers import Sampler, Samplers
from pipeline.storage import filesystem, split_url
from pipeline.synthesis_settings import SamplerSettings

MAX_PERSONA_BYTES = 64 << 20


def samplers_of(spec: JobSpec, input_root: str, columns: list[str]) -> Samplers | None:
    """The job's samplers; None if it has none.

    Args:
        spec: the job.
        input_root: folder of all input files.
        columns: of the input, as far as they are read.

    Raises:
        SpecError: a persona file can't be read or has no lines; a sampler has the name of a column.
    """
    if spec.synthesize is None or not spec.synthesize.samplers:
        return None
    for name in spec.synthesize.samplers:
        if name in columns:
            raise SpecError(f"synthesize.samplers.{name}: the input has a column {name!r} already; rename the sampler")
    made = tuple(_sampler(name, settings) for name, settings in spec.synthesize.samplers.items())
    return Samplers(made, spec.synthesize.sampler_seed, input_root)


def personas_identity(spec: JobSpec, samplers: Samplers | None) -> dict[str, Any]:
    """What the files of personas held, for the fingerprint."""
    if spec.synthesize is None or samplers is None:
        return {}
    paths = {name: one.persona for name, one in spec.synthesize.samplers.items() if one.persona is not None}
    held = {each.name: each.values for each in samplers.samplers if isinstance(each.values, tuple)}
    return {
        f"{name}: {path}": hashlib.sha256("\n".join(held[name]).encode()).hexdigest() for name, path in paths.items()
    }


def _sampler(name: str, settings: SamplerSettings) -> Sampler:
    if settings.range is not None:
        least, greatest = settings.range
        return Sampler(name, range(least, greatest + 1))
    if settings.persona is not None:
        return Sampler(name, _lines(name, settings.persona))
    if isinstance(settings.category, dict):
        return Sampler.weighted(name, settings.category)
    return Sampler(name, tuple(settings.category or ()))


def _lines(name: str, path: str) -> tuple[str, ...]:
    field = f"synthesize.samplers.{name}.persona"
    try:
        with filesystem(path).open(split_url(path)[1], "rb") as file:
            data = file.read(MAX_PERSONA_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{field}: {path} can't be read: {error}; name a UTF-8 text file, a value a line") from error
    if len(data) > MAX_PERSONA_BYTES:
        raise SpecError(f"{field}: {path} is larger than 64 MiB; shorten it")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise SpecError(f"{field}: {path} has no line with text; write a value on each")
    return lines
