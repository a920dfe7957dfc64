"""How tokens are drawn for one row: the job's settings, laid over with the row's own, and the row's seed.

Pure. Knows nothing of engines; the invariant is that whatever it returns an engine accepts.
"""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from pydantic import ValidationError

from pipeline.errors import RowError
from pipeline.settings import SamplingSettings

STAGE = "template"
_JOB_ONLY = ("column", "fit", "dedupe")
_ALLOWED = tuple(name for name in SamplingSettings.model_fields if name not in _JOB_ONLY)
_SEEDS = 2**62
# vLLM treats smaller temperatures as greedy (vllm.sampling_params, _SAMPLING_EPS).
_GREEDY_BELOW = 1e-5


def row_seed(job_seed: int, file: str, row: int) -> int:
    """Return the seed of one row, 0 <= seed < 2**62: a function of the job's seed and the row's identity alone.

    The upper bound leaves room for `seed + sample_index` in a signed 64-bit integer.
    """
    digest = blake2b(f"{job_seed}\0{row}\0{file}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _SEEDS


def row_sampling(base: SamplingSettings, override_json: str | None) -> SamplingSettings:
    """Return `base` with the row's overrides, a JSON object, laid over it; None returns `base` itself.

    Raises:
        RowError: kind `bad_sampling`; the message names the key and the rule it breaks.
    """
    if override_json is None:
        _check_together(base)
        return base
    override = _parse(override_json)
    for key in override:
        if key not in _ALLOWED:
            raise _bad(_unknown(key))
    merged = base.model_dump() | _no_json(override) | override
    try:
        settings = SamplingSettings.model_validate(merged, strict=True)
    except ValidationError as error:
        raise _bad("; ".join(_describe(detail) for detail in error.errors())) from None
    _check_together(settings)
    return settings


def _no_json(override: dict[str, Any]) -> dict[str, Any]:
    """What the job says of JSON, unsaid for a row that says something else of it."""
    return {"json_object": False, "json_schema": None} if {"json_object", "json_schema"} & override.keys() else {}


def is_greedy(settings: SamplingSettings) -> bool:
    """Whether the engine takes the likeliest token each time, so that the seed doesn't matter."""
    return settings.temperature < _GREEDY_BELOW


def _check_together(settings: SamplingSettings) -> None:
    # The engine refuses several greedy samples: they would all be the same.
    if settings.n > 1 and is_greedy(settings):
        raise _bad(f"`n` is {settings.n} and `temperature` {settings.temperature:g} is greedy, all equal; set `n` to 1")


def _parse(text: object) -> dict[str, Any]:
    if not isinstance(text, str):
        raise _bad(f"the sampling column holds {type(text).__name__}; it must hold JSON text, or null for no override")
    try:
        override = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(f'{_shown(text)} is not JSON ({error}); write an object such as {{"temperature": 0}}') from None
    if not isinstance(override, dict):
        raise _bad(f'{_shown(text)} is not a JSON object; write one such as {{"temperature": 0}}, or null')
    return override


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("a key is given twice")
    return keys


def _unknown(key: str) -> str:
    if key in _JOB_ONLY:
        return f"`{key}` belongs to the job and can't be set per row; remove it"
    return f"`{key[:40]}` is not a sampling setting; allowed are {', '.join(_ALLOWED)}"


def _describe(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    rule = str(detail["msg"]).removeprefix("Value error, ")
    return f"`{path}` is {_shown(detail['input'])}: {rule}" if path else rule


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _bad(message: str) -> RowError:
    return RowError("bad_sampling", message, STAGE)


def sampling_to_json(settings: SamplingSettings) -> str:
    """Return settings as one line of JSON with every field; equal settings give equal text."""
    return settings.model_dump_json()


@lru_cache(maxsize=4096)
def sampling_from_json(text: str) -> SamplingSettings:
    """Return what `sampling_to_json` was given. Cached: nearly all rows of a job share one text."""
    return SamplingSettings.model_validate_json(text)
