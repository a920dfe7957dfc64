"""The tree of everything a spec may say: each field's dotted path, doc, default and what it allows, in words.

Read off the pydantic models, so it can't disagree with them. A job's, or within `describing` another file's. Knows
nothing of files, lines or overrides.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jobs.field_docs import document
from jobs.job_spec import JobSpec
from jobs.yaml_source import FieldPath

_SHORTEST_PREFIX = 3

# What people coming from vllm, ray.data.llm, distilabel and the OpenAI API write first.
_SYNONYMS = {
    "batch_size": "",
    "concurrency": "fleet.pools[0].replicas",
    "num_replicas": "fleet.pools[0].replicas",
    "tensor_parallel_size": "fleet.pools[0].tensor_parallel",
    "tp": "fleet.pools[0].tensor_parallel",
    "gpu_type": "fleet.pools[0].gpu",
    "accelerator_type": "fleet.pools[0].gpu",
    "max_new_tokens": "sampling.max_tokens",
    "max_completion_tokens": "sampling.max_tokens",
    "num_samples": "sampling.n",
    "best_of": "sampling.n",
    "num_generations": "sampling.n",
    "stop_sequences": "sampling.stop",
    "sampling_params": "sampling",
    "engine_kwargs": "model.engine_args",
    "model_source": "model.source",
    "model_id": "model.source",
    "max_seq_len": "model.max_model_len",
    "context_length": "model.max_model_len",
    "torch_dtype": "model.dtype",
    "system_prompt": "prompt.system",
    "system_message": "prompt.system",
    "few_shot": "prompt.examples",
    "columns": "output.keep",
    "num_rows": "input.limit",
    "timeout_s": "limits.request_timeout_s",
    "max_retries": "limits.max_attempts",
}


@dataclass(frozen=True, slots=True)
class FieldNode:
    """One field of the spec."""

    path: tuple[str, ...]
    kind: Literal["section", "option", "sections", "table", "value"]
    """A mapping with known keys, one that may be null, a list of such, a mapping with free keys, or a plain value."""
    doc: str
    is_required: bool
    default: Any
    children: Mapping[str, FieldNode]
    schema: Mapping[str, Any]
    """The field's JSON schema, references resolved."""

    @property
    def dotted(self) -> str:
        """The path as a person writes it."""
        return ".".join(self.path)


_described: ContextVar[type[BaseModel]] = ContextVar("_described", default=JobSpec)


@contextmanager
def describing(model: type[BaseModel]) -> Iterator[None]:
    """Within the block all paths, suggestions and messages are about a file of this model."""
    token = _described.set(model)
    try:
        yield
    finally:
        _described.reset(token)


def field_tree() -> FieldNode:
    """The root: JobSpec itself, but within `describing`."""
    return _tree_of(_described.get())


@cache
def _tree_of(model: type[BaseModel]) -> FieldNode:
    document(model)
    schema = model.model_json_schema()
    children = _children(model, (), schema)
    return FieldNode((), "section", "A job.", is_required=True, default=None, children=children, schema=schema)


def all_fields(node: FieldNode | None = None) -> Iterator[FieldNode]:
    """Every field below a node, parents first, in the order of the models; an option counts as one field."""
    for child in (node or field_tree()).children.values():
        yield child
        if child.kind != "option":
            yield from all_fields(child)


def find_field(path: FieldPath) -> FieldNode | None:
    """The field that a path leads to or into; None if there is none. List indices count as their list."""
    node = field_tree()
    for step in path:
        if node.kind in ("table", "value") or isinstance(step, int):
            continue
        if step not in node.children:
            return None
        node = node.children[step]
    return node


def suggest(path: FieldPath) -> str | None:
    """The existing path that was probably meant by one that doesn't exist."""
    names = [step for step in path if isinstance(step, str)]
    parent, wrong = find_field(path[:-1]), str(path[-1])
    if parent is not None:
        by_squashed = {_squash(name): name for name in parent.children}
        if _squash(wrong) in by_squashed:
            return format_path((*path[:-1], by_squashed[_squash(wrong)]))
    if wrong in _SYNONYMS and _is_described(_SYNONYMS[wrong]):
        return _SYNONYMS[wrong] or None
    siblings = list(parent.children) if parent is not None else []
    longer = [name for name in siblings if len(wrong) >= _SHORTEST_PREFIX and name.startswith(wrong)]
    if close := longer or difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6):
        return format_path((*path[:-1], close[0]))
    return _suggest_elsewhere(".".join(names), wrong)


def _is_described(dotted: str) -> bool:
    """Whether the file at hand has the section that a path begins with; nothing at all is in every file."""
    return not dotted or dotted.partition(".")[0] in field_tree().children


def _suggest_elsewhere(dotted: str, wrong: str) -> str | None:
    by_name: dict[str, FieldNode] = {}
    for node in all_fields():
        by_name.setdefault(node.path[-1], node)
    if wrong in by_name:
        return _example_path(by_name[wrong])
    by_dotted = {node.dotted: node for node in all_fields()}
    if close := difflib.get_close_matches(dotted, by_dotted, n=1, cutoff=0.75):
        return _example_path(by_dotted[close[0]])
    close = difflib.get_close_matches(wrong, by_name, n=1, cutoff=0.8)
    return _example_path(by_name[close[0]]) if close else None


def _example_path(node: FieldNode) -> str:
    """Dotted path with `[0]` after every list, so that it can be typed as it is."""
    steps: list[str | int] = []
    for depth, name in enumerate(node.path, start=1):
        steps.append(name)
        owner = find_field(node.path[:depth])
        if owner is not None and owner.kind == "sections" and depth < len(node.path):
            steps.append(0)
    return format_path(tuple(steps))


def format_path(path: FieldPath) -> str:
    """`("fleet", "pools", 0, "gpu")` -> `fleet.pools[0].gpu`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def describe_allowed(schema: Mapping[str, Any]) -> str:
    """What a field accepts, in words, e.g. `an integer from 1 to 1024`."""
    if "anyOf" in schema:
        return " or ".join(describe_allowed(option) for option in schema["anyOf"])
    if "enum" in schema:
        return _one_of(schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _range(schema)
    if kind == "array":
        at_least = " with at least one entry" if schema.get("minItems") else ""
        return f"a list{at_least}, each entry {describe_allowed(schema['items'])}"
    if kind == "string":
        return "non-empty text" if schema.get("minLength") else "text"
    return {"boolean": "true or false", "null": "null", "object": "a mapping"}.get(str(kind), "any value")


def schema_at(path: FieldPath) -> Mapping[str, Any]:
    """JSON schema of what may stand at a path, entries of lists included."""
    node = find_field(path)
    if node is None:
        return {}
    schema = node.schema
    if path and isinstance(path[-1], int):
        options = schema.get("anyOf", [schema])
        schema = next((option["items"] for option in options if "items" in option), {})
    return schema


def _one_of(values: list[Any]) -> str:
    shown = [f"`{value}`" for value in values]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _range(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    upper = f" to {high:g}" if high is not None else f" to below {below}" if below is not None else ""
    if low is not None:
        return f" from {low:g}{upper}" if upper else f" of at least {low:g}"
    return f" above {above:g}{upper.replace(' to ', ' and up to ')}" if above is not None else upper


def _squash(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


def _children(model: type[BaseModel], path: tuple[str, ...], schema: Mapping[str, Any]) -> dict[str, FieldNode]:
    return {name: _node(info, (*path, name), schema) for name, info in model.model_fields.items()}


def _node(info: FieldInfo, path: tuple[str, ...], root: Mapping[str, Any]) -> FieldNode:
    model, is_list = _model_in(info.annotation)
    kind: Literal["section", "option", "sections", "table", "value"] = "value"
    if model is not None:
        kind = "sections" if is_list else "section" if info.default is not None else "option"
    elif get_origin(info.annotation) is dict:
        kind = "table"
    default = info.default if info.default is not PydanticUndefined else None
    return FieldNode(
        path=path,
        kind=kind,
        doc=info.description or (model.__doc__ if model is not None else None) or "",
        is_required=info.is_required(),
        default=default,
        children=_children(model, path, root) if model is not None else {},
        schema=_schema_of(path, root),
    )


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, UnionType) and len(rest := set(get_args(annotation)) - {type(None)}) == 1:
        [annotation] = rest
    inner = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    is_model = isinstance(inner, type) and issubclass(inner, BaseModel)
    return (inner, inner is not annotation) if is_model else (None, False)


def _schema_of(path: tuple[str, ...], root: Mapping[str, Any]) -> Mapping[str, Any]:
    schema: Any = root
    for name in path:
        schema = _resolve(_resolve(_present(schema), root)["properties"][name], root)
    return dict(schema)


def _present(schema: Any) -> Any:
    """The schema of an option that is there."""
    references = [option for option in schema.get("anyOf", ()) if "$ref" in option]
    return references[0] if len(references) == 1 else schema


def _resolve(schema: Any, root: Mapping[str, Any]) -> Any:
    while "$ref" in schema or (schema.get("type") == "array" and "$ref" in schema["items"]):
        reference = schema.get("$ref") or schema["items"]["$ref"]
        schema = root["$defs"][reference.rsplit("/", 1)[-1]]
    return schema
