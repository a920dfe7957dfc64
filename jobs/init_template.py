"""The commented spec that `tramontane init` writes, generated from the settings models.

Guarantees:
- every field is there with its documentation: in force when the example sets it, else commented out at its default.
- it is valid as it is, and with any or all of the commented fields in force.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from jobs.spec_fields import FieldNode, field_tree
from jobs.yaml_source import plain_value

_WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./:*-]*")


def init_template(
    *, name: str = "quickstart", input_path: str = "prompts/*.parquet", output_path: str | None = None
) -> str:
    """Text of a spec to start from; `name` is made a legal one, and the output is named after it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:64] or "quickstart"
    chosen = {
        "name": name,
        "model.source": "tiny",
        "input.path": input_path,
        "prompt.messages": "messages",
        "sampling.temperature": 0.7,
        "sampling.seed": 1,
        "output.path": output_path or f"out/{name}",
        "fleet.pools.gpu": "cpu",
        "fleet.pools.replicas": 1,
    }
    lines = [
        "# A Tramontane job. A line `#field: value` is off, at its default; remove the `#` to change it.",
        "# Check it with `tramontane validate`, try three rows with `tramontane preview`, then `tramontane run`.",
        "",
    ]
    for node in field_tree().children.values():
        lines += [*_field(node, chosen, "", is_first=False), ""]
    return "\n".join(lines).rstrip() + "\n"


def _field(node: FieldNode, chosen: Mapping[str, Any], indent: str, *, is_first: bool) -> Iterator[str]:
    """A field and all below it; the first field of a list entry carries the dash."""
    lead = f"{indent[:-2]}- " if is_first else indent
    yield from _comment(node.doc, indent[:-2] if is_first else indent)
    key = f"{lead}{node.path[-1]}:"
    if node.kind == "section" or (node.kind == "sections" and any(name.startswith(node.dotted) for name in chosen)):
        yield key
        yield from _section(node, chosen, indent)
    elif node.dotted in chosen:
        yield f"{key} {yaml_text(chosen[node.dotted])}"
    else:
        if node.kind == "option":
            yield from _comment(f"A mapping: {{{', '.join(f'{name}: ...' for name in node.children)}}}", indent)
        if node.kind == "sections":
            yield from _comment(f"Each entry: {{{', '.join(f'{name}: ...' for name in node.children)}}}", indent)
        yield f"{indent}#{node.path[-1]}: {yaml_text(node.default)}"


def _section(node: FieldNode, chosen: Mapping[str, Any], indent: str) -> Iterator[str]:
    deeper = indent + ("    " if node.kind == "sections" else "  ")
    for index, child in enumerate(node.children.values()):
        yield from _field(child, chosen, deeper, is_first=node.kind == "sections" and index == 0)


def _comment(doc: str, indent: str) -> list[str]:
    text = " ".join(doc.split())
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") if text else []


def yaml_text(value: object) -> str:
    """A value on one line of YAML, without quotes where it needs none."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and isinstance(plain_value(value), str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return json.dumps([entry.model_dump() for entry in value])
    return json.dumps(value, ensure_ascii=False)
