"""The text under each field of a settings model, read from the source when it is wanted.

pydantic can do this itself (`use_attribute_docstrings`), but for every model at its definition, which cost `validate` a
quarter of its time (60 of 300 ms).
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel


@cache
def document(model: type[BaseModel]) -> None:
    """Give the fields of a model, and of all models in it, their descriptions, in JSON schemas too."""
    for child in _models_in(model):
        document(child)
    for name, text in _field_texts(model).items():
        model.model_fields[name].description = text
    model.model_rebuild(force=True)


def _models_in(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    pending: list[Any] = [info.annotation for info in model.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        pending += get_args(annotation)


def _field_texts(model: type[BaseModel]) -> dict[str, str]:
    """{field: the string literal that follows it}, of the model's own class body."""
    body = _classes(model.__module__)[model.__name__].body
    texts = {}
    for field, after in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            texts[field.target.id] = inspect.cleandoc(after.value.value)
    return texts


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
