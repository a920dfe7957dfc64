"""A fleet file's YAML -> one frozen, validated FleetFile; or one SpecError that shows all errors, as for a job's spec.

Uses the machinery of specs: the same subset of YAML, the same wording, the same rules between fields. Imports neither
Ray nor the engine.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.fleet_file import FleetFile
from jobs.spec_errors import spec_error, without_consequences
from jobs.spec_fields import describing, field_tree
from jobs.spec_messages import problems_of
from jobs.spec_rules import SECTION_MODELS, Sections, check_rules
from jobs.yaml_source import Document, Mark, Problem, parse_yaml
from pipeline.errors import SpecError

_SHARED_SECTIONS = ("model", "routing", "fleet")


def load_fleet_file(path: str | Path) -> FleetFile:
    """Read and validate a fleet file.

    Raises:
        SpecError: it can't be read, or anything in it is wrong; the message shows all of it.
    """
    return parse_fleet_file(
        read_yaml_text(Path(path), cure="cluster/examples/fleet.yaml is one to start from"), str(path)
    )


def parse_fleet_file(text: str, name: str) -> FleetFile:
    """Validate the text of a fleet file; `name` stands for the file in messages.

    Raises:
        SpecError: anything in it is wrong; the message shows all of it.
    """
    document = parse_yaml(text, name=name)
    with describing(FleetFile):
        file = _validate(document) if document.is_whole else None
        if file is None:
            raise spec_error(document.problems, document, {})
    return file


def read_yaml_text(path: Path, *, cure: str) -> str:
    """A file's text.

    Raises:
        SpecError: it can't be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SpecError(f"{path}: there is no such file; {cure}") from None
    except OSError as error:
        raise SpecError(f"{path}: can't be read: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not UTF-8 text; save the file as UTF-8") from None


def _validate(document: Document) -> FleetFile | None:
    """The file, or None with every problem added to the document."""
    if not isinstance(document.data, dict):
        needed = ", ".join(field_tree().children)
        mark = document.values.get((), Mark(1, 1))
        document.problems.append(Problem((), f"a fleet file is a mapping with: {needed}", mark=mark))
        return None
    # A section whose lines are all commented out reads as null; it means its defaults.
    data = {name: {} if value is None and name != "name" else value for name, value in document.data.items()}
    file, found = None, []
    try:
        file = FleetFile.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found = problems_of(error, data, document.scalars)
    document.problems += without_consequences(found, document.problems)
    document.problems += without_consequences(check_rules(_sections(data, document.problems)), document.problems)
    return None if document.problems else file


def _sections(data: Mapping[str, Any], problems: list[Problem]) -> Sections:
    """Sections that a job's spec has too, where nothing in them is wrong."""
    wrong = frozenset(problem.path for problem in problems)
    valid: dict[str, Any] = {}
    for name in _SHARED_SECTIONS:
        if not any(path[:1] == (name,) for path in wrong):
            with contextlib.suppress(ValidationError):
                valid[name] = SECTION_MODELS[name].model_validate_json(json.dumps(data.get(name, {})), strict=True)
    return Sections(wrong=wrong, **valid)
