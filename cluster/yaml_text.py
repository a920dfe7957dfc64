"""Plain data and comments to YAML text that people read. Pure.

Guarantees:
- `yaml.safe_load_all` of the text gives back the data.
- order is the data's; text of several lines becomes a `|` block.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z_/~][A-Za-z0-9_./~@=,()+-]*")
_MEANS_SOMETHING_ELSE = re.compile(r"(?i)true|false|yes|no|on|off|y|n|null|~|[=]")
_WIDTH = 118

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Commented:
    """One YAML document."""

    data: Mapping[str, Any]
    head: Sequence[str] = ()
    """Lines above it."""
    comments: Mapping[Path, str] = field(default_factory=dict)
    """What stands above a key; entries of a list that have a name are addressed by it, others by `*`."""


def yaml_text(documents: Sequence[Commented]) -> str:
    """All documents as one text."""
    return "---\n".join(_document(document) for document in documents)


def _document(document: Commented) -> str:
    head = [f"# {line}".rstrip() for line in document.head]
    return "\n".join([*head, *_mapping(document.data, (), document.comments, indent=0)]) + "\n"


def _mapping(data: Mapping[str, Any], path: Path, comments: Mapping[Path, str], *, indent: int) -> list[str]:
    lines: list[str] = []
    pad = " " * indent
    for key, value in data.items():
        here = (*path, key)
        if here in comments:
            lines += [f"{pad}# {line}" for line in _wrapped(comments[here], _WIDTH - indent)]
        lines += _entry(f"{pad}{_scalar(key)}:", value, here, comments, indent=indent)
    return lines


def _entry(start: str, value: Any, path: Path, comments: Mapping[Path, str], *, indent: int) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [start, *_mapping(value, path, comments, indent=indent + 2)]
    if isinstance(value, list) and value:
        return [start, *_list(value, path, comments, indent=indent)]
    if isinstance(value, str) and _fits_block(value):
        block = [f"{' ' * (indent + 2)}{line}".rstrip() for line in value.removesuffix("\n").split("\n")]
        return [f"{start} |{'' if value.endswith(chr(10)) else '-'}", *block]
    return [f"{start} {_scalar(value)}"]


def _list(values: Sequence[Any], path: Path, comments: Mapping[Path, str], *, indent: int) -> list[str]:
    lines: list[str] = []
    pad = " " * indent
    for value in values:
        if isinstance(value, Mapping) and value:
            name = value.get("name", value.get("groupName", "*"))
            inner = _mapping(value, (*path, str(name)), comments, indent=indent + 2)
            first = next(index for index, line in enumerate(inner) if not line.lstrip().startswith("#"))
            lines += [f"{pad}{line.lstrip()}" for line in inner[:first]]
            lines += [f"{pad}- {inner[first].lstrip()}", *inner[first + 1 :]]
        else:
            lines.append(f"{pad}- {_scalar(value)}")
    return lines


def _fits_block(text: str) -> bool:
    """Whether a `|` block says exactly this text: no edge white space, no control characters."""
    body = text.removesuffix("\n")
    if "\n" not in body or body.endswith("\n") or not body.replace("\n", "").isprintable():
        return False
    lines = body.split("\n")
    return bool(lines[0].strip()) and not lines[0].startswith(" ") and all(line == line.rstrip() for line in lines)


def _scalar(value: Any) -> str:
    """Words that mean themselves as they are, other text in quotes; collections on one line."""
    if isinstance(value, list | Mapping):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).rstrip()
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and not _MEANS_SOMETHING_ELSE.fullmatch(value):
        return value
    return yaml.safe_dump(value, default_style='"', width=math.inf, allow_unicode=True).rstrip("\n")


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and len(line) + 1 + len(word) > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    return lines
