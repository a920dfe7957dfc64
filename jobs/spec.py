"""A YAML file and its `--set` overrides -> one frozen, validated JobSpec; or one SpecError that shows all errors.

Imports neither Ray nor the engine nor Arrow, so that `tramontane validate` answers within 0.3 s.
Guarantees:
- what is returned has passed every rule that can be checked without looking at the input.
- a file from anywhere costs less than a second and constructs nothing but plain data; a Python file that it names for a
  schema is run, and has to lie in this folder or below.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.settings import AUTO
from jobs.field_docs import document
from jobs.job_spec import JobSpec
from jobs.spec_errors import spec_error, without_consequences
from jobs.spec_fields import field_tree
from jobs.spec_label import expand_label
from jobs.spec_messages import problems_of
from jobs.spec_models import MODEL_NAME, read_model
from jobs.spec_openai import expand_openai_batch
from jobs.spec_overrides import apply_overrides
from jobs.spec_rules import SECTION_MODELS, Sections, check_rules
from jobs.spec_synthesize import expand_synthesis
from jobs.yaml_source import MAX_BYTES, Document, FieldPath, Mark, Problem, parse_yaml
from pipeline.errors import SpecError
from pipeline.settings import Settings


def load_spec(path: str | Path, overrides: Sequence[str] = (), *, runs_files: bool = True) -> JobSpec:
    """Read and validate a spec; without `runs_files` less its models' schemas, for who needs name and places only.

    Raises:
        SpecError: the file can't be read, or anything in it or in an override is wrong; the message shows all of it.
    """
    return parse_spec(_read(Path(path)), name=str(path), overrides=overrides, runs_files=runs_files)


def parse_spec(text: str, *, name: str, overrides: Sequence[str] = (), runs_files: bool = True) -> JobSpec:
    """Validate the text of a spec; `name` stands for the file in messages.

    Raises:
        SpecError: anything in it or in an override is wrong; the message shows all of it.
    """
    document = parse_yaml(text, name=name)
    applied: dict[FieldPath, str] = {}
    if document.is_whole:
        _check_root(document)
    if document.is_whole:
        applied = apply_overrides(document, list(overrides))
        files, problems = read_model(document.data, runs_files=runs_files)
        document.problems += problems
        spec = _validate(document)
        if spec is not None:
            return spec.read_from(files)
    raise spec_error(document.problems, document, applied)


def spec_json_schema() -> dict[str, Any]:
    """JSON schema of a spec, for editors; rules between fields are not in it."""
    document(JobSpec)
    schema = JobSpec.model_json_schema()
    for name, node in field_tree().children.items():
        entry = schema["properties"][name]
        if node.kind == "section" and name not in schema["required"]:
            # See `_check_root`: what `init` writes has such sections.
            entry["anyOf"] = [{"$ref": entry.pop("$ref")}, {"type": "null"}]
    schema["properties"]["fleet"]["anyOf"].append({"const": AUTO})
    schema["$defs"]["SamplingSettings"]["properties"]["json_schema"]["anyOf"].append(MODEL_NAME)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Tramontane job"}


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: there is no such file; `tramontane init` writes one to start from") from None
    except OSError as error:
        raise SpecError(f"{path}: can't be read: {error.strerror}; name a YAML file") from None
    if data.startswith(b"PAR1"):
        raise SpecError(f"{path} is a Parquet file; name the job's YAML file, whose `input.path` names rows")
    if len(data) > MAX_BYTES:
        raise SpecError(f"{path}: larger than 1 MiB; a spec is settings only, rows belong into `input.path`")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise SpecError(f"{path}:{line}:{column}: not UTF-8 text; save the file as UTF-8") from None


def _check_root(document: Document) -> None:
    if document.data is None:
        document.data = {}
    if not isinstance(document.data, dict):
        mark = document.values.get((), Mark(1, 1))
        needed = ", ".join(field_tree().children)
        document.problems.append(Problem((), f"a spec is a mapping with: {needed}", mark=mark))
        document.is_whole = False
        return
    for name in _sections_with_fields():
        # A section whose lines are all commented out reads as null; it means its defaults.
        if document.data.get(name, ...) is None:
            document.data[name] = {}


def _sections_with_fields() -> list[str]:
    """Names of the sections that are always there. Quicker than `field_tree`, which makes a JSON schema: 60 ms."""
    kinds = {name: info.annotation for name, info in JobSpec.model_fields.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)]


def _validate(document: Document) -> JobSpec | None:
    """The spec, or None with every problem added to the document."""
    found: list[Problem] = []
    spec = None
    try:
        expanded = copy.deepcopy(document.data)
        expand_label(expanded)
        expand_openai_batch(expanded)
        expand_synthesis(expanded)
        # Strict JSON mode: in lax mode `max_tokens: true` is 1 and `safe_prompt: "off"` is false.
        spec = JobSpec.model_validate_json(json.dumps(expanded), strict=True)
    except ValidationError as error:
        found = problems_of(error, expanded, document.scalars)
    found = without_consequences(found, document.problems)
    document.problems += found
    broken_rules = check_rules(_sections(document.data, document.problems))
    document.problems += without_consequences(broken_rules, document.problems)
    return None if document.problems else spec


def _sections(data: Mapping[str, Any], problems: Sequence[Problem]) -> Sections:
    """What can still be checked: each section less the fields that are known to be wrong."""
    wrong = frozenset(problem.path for problem in problems)
    rest = copy.deepcopy(dict(data))
    for path in wrong:
        _delete(rest, path)
    valid: dict[str, Any] = {}
    for name, model in SECTION_MODELS.items():
        if name in JobSpec.model_fields and (name,) not in wrong:
            with contextlib.suppress(ValidationError):
                valid[name] = model.model_validate_json(json.dumps(rest.get(name, {})), strict=True)
    return Sections(wrong=wrong, given=data, **valid)


def _delete(data: Any, path: FieldPath) -> None:
    for step in path[:-1]:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return
    if path and isinstance(data, dict):
        data.pop(path[-1], None)
