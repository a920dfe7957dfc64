"""Rules about the paths in a spec: allowed URL schemes, and an output that never lies within its own input.

Compares paths as text; only symbolic links of local paths are looked up, so that validating needs no network.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.yaml_source import FieldPath, Problem
from pipeline.errors import SpecError
from pipeline.settings import InputSettings, ModelSettings, OutputSettings
from pipeline.storage import split_url

_SAME_STORE = {"gcs": "gs", "abfss": "abfs", "az": "abfs"}
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class _Place:
    scheme: str
    steps: tuple[str, ...]

    def is_within(self, other: _Place) -> bool:
        return self.scheme == other.scheme and self.steps[: len(other.steps)] == other.steps


def check_paths(
    source: InputSettings | None, output: OutputSettings | None, model: ModelSettings | None
) -> Iterator[Problem]:
    """Broken rules about `input.path`, `output.path` and `model.source`."""
    inputs = _input_paths(source) if source is not None else {}
    outputs: dict[FieldPath, str] = {("output", "path"): output.path} if output is not None else {}
    models: dict[FieldPath, str] = {("model", "source"): model.source} if model is not None else {}
    wrong: dict[FieldPath, Problem] = {}
    for path, url in {**inputs, **outputs, **models}.items():
        if (message := _fault_of(url)) is not None:
            wrong[path] = Problem(path, message)
    yield from wrong.values()
    if inputs == {} and source is not None:
        yield Problem(("input", "path"), "`input.path` is an empty list", hint="name at least one file")
    if output is not None and ("output", "path") not in wrong:
        good = {path: url for path, url in inputs.items() if path not in wrong}
        yield from _check_overlap(good, output.path)


def _input_paths(source: InputSettings) -> dict[FieldPath, str]:
    if isinstance(source.path, str):
        return {("input", "path"): source.path}
    return {("input", "path", index): url for index, url in enumerate(source.path)}


def _fault_of(url: str) -> str | None:
    if not url.strip():
        return "a path is empty"
    try:
        split_url(url)
    except SpecError as error:
        return error.message
    return None


def _check_overlap(inputs: dict[FieldPath, str], output: str) -> Iterator[Problem]:
    if _WILDCARD.search(output):
        yield Problem(("output", "path"), f"`output.path` is {output}, but can't hold wildcards; name one directory")
        return
    target = _place(output)
    for url in inputs.values():
        fixed = _place(_before_wildcard(url))
        if fixed == target and not _WILDCARD.search(url):
            reason = "is the input itself"
        elif fixed.is_within(target):
            reason = f"contains the input {url}"
        elif _would_read(url, target):
            reason = f"lies within the input {url}, so that the next run would read its results"
        else:
            continue
        hint = "name a directory of its own, beside the input"
        yield Problem(("output", "path"), f"`output.path`, {output}, {reason}", hint=hint)
        return


def _place(url: str) -> _Place:
    scheme, rest = split_url(url)
    if scheme == "file":
        rest = os.path.realpath(os.path.expanduser(rest))
    return _Place(_SAME_STORE.get(scheme, scheme), tuple(step for step in rest.split("/") if step))


def _before_wildcard(url: str) -> str:
    found = _WILDCARD.search(url)
    return url if found is None else url[: found.start()].rpartition("/")[0] or ("/" if url.startswith("/") else ".")


def _would_read(url: str, target: _Place) -> bool:
    """Whether the input's path or pattern reaches what the run writes."""
    if not _WILDCARD.search(url):
        return target.is_within(_place(url))
    if "**" in url:
        return target.is_within(_place(_before_wildcard(url)))
    pattern = _place(url)
    return pattern.scheme == target.scheme and any(
        len(pattern.steps) <= len(written) and all(map(fnmatch.fnmatchcase, written, pattern.steps))
        for written in ((*target.steps, "data", "part-0.parquet"), (*target.steps, "routing", "routing.parquet"))
    )
