"""`sampling.json_schema: records.py:Ticket`: the schema of a pydantic model in a Python file of the job's author.

The file is run, as whoever wrote the spec is trusted. Rows can't name one: their overrides are data, and a text among
them is no schema.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from jobs.yaml_source import FieldPath, Problem

FIELD: FieldPath = ("sampling", "json_schema")
_HOW = "write FILE.py:Class, a file in this folder or below, e.g. `records.py:Ticket`"


MODEL_NAME = {"type": "string", "pattern": r"\.py:\w+$"}
"""Of what the field may be in a file, beside a schema itself."""


class _NoModelError(Exception):
    """Carries what is wrong, and the cure."""


def read_model(data: dict[str, Any], *, runs_files: bool) -> tuple[list[str], list[Problem]]:
    """Put the schema in the place of the model's name; returns the files that were read, and what is wrong.

    What is wrong is taken out of `data`, so that nothing else is said of it; without `runs_files` any name is.
    """
    sampling = data.get("sampling")
    named = sampling.get("json_schema") if isinstance(sampling, dict) else None
    if not isinstance(sampling, dict) or not isinstance(named, str):
        return [], []
    if not runs_files:
        sampling["json_schema"] = None
        return [], []
    try:
        file, schema = _schema(named)
    except _NoModelError as error:
        sampling["json_schema"] = None
        message, hint = error.args
        return [], [Problem(FIELD, message, hint=hint)]
    sampling["json_schema"] = schema
    return [file], []


def _schema(named: str) -> tuple[str, dict[str, Any]]:
    file, separator, name = named.rpartition(":")
    steps = Path(file).parts
    stays_here = ".." not in steps and not file.startswith(("/", "~"))
    if not separator or not file.endswith(".py") or not name.isidentifier() or not stays_here:
        raise _NoModelError(f"{named!r} names no pydantic model", _HOW)
    try:
        model = getattr(_module(file), name, None)
    except FileNotFoundError:
        raise _NoModelError(f"there is no file {file}", _HOW) from None
    except (Exception, SystemExit) as error:  # an exit code of the file's would pass for the command's
        message = f"{file} can't be run: {type(error).__name__}: {error}"
        raise _NoModelError(message[:500], "mend it; it has to stand alone, without other files of yours") from error
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise _NoModelError(f"{file} has no pydantic model {name!r}", _HOW)
    try:
        return file, model.model_json_schema()
    except Exception as error:  # e.g. of a field that is a function, or of BaseModel itself
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _NoModelError(f"{named} has no JSON schema: {reason}", "use fields that JSON can hold") from error


def _module(file: str) -> Any:
    path = Path(file).resolve()
    name = f"tramontane_job_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pydantic looks for what annotations name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
