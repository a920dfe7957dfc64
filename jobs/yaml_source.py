"""YAML text -> plain data, with the line and column of every key and value.

Owns which part of YAML a spec may use: mappings, lists and scalars; no anchors, aliases, tags or repeated keys, at
most 1 MiB, 32 levels and 20,000 values. Knows nothing of what the fields mean.
Guarantees:
- nothing is constructed but dict, list, str, int, finite float, bool and None.
- every value has a mark, and a problem found in the text doesn't hide the next one unless it is a syntax error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000

FieldPath = tuple[str | int, ...]

# YAML 1.2's core schema rather than PyYAML's 1.1: there `off` is false, `010` is 8, `1:30` is 90, `1_0` is 10, `1e3` is
# text and `2026-01-01` is a date. Here those stay text, except `1e3`, and the field's type decides whether they may.
_LONGEST_NUMBER = 400
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_HINTS = (
    ("alias", '`*` starts an alias in YAML; quote the value, e.g. "*.parquet"'),
    ("anchor", "`&` starts an anchor in YAML; quote the value"),
    ("mapping values are not allowed", "a value that contains `: ` must be quoted, or written as a block after `|`"),
    ("cannot start any token", "a value that starts with `@`, `%` or a backtick must be quoted"),
    ("could not find expected ':'", "every line of a mapping is `key: value`, with a space after the colon"),
    ("did not find expected ',' or", "a bracket or brace is not closed, or a comma is missing"),
    ("did not find expected key", "check the indentation: keys of one mapping start in one column"),
    ("did not find expected <document start>", "check the indentation: keys of one mapping start in one column"),
    ("unexpected end of stream", "a quote is not closed"),
    ("escape character", "backslashes are escapes inside double quotes; use single quotes"),
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the text: 1-based line and column, and how many characters to underline."""

    line: int
    column: int
    width: int = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    path: FieldPath
    message: str
    hint: str | None = None
    mark: Mark | None = None
    """Where, if known; else the place is looked up by `path`."""
    on_key: bool = False
    """Whether to point at the key rather than at its value."""
    line_in_value: int | None = None
    """1-based line inside a multi-line string."""
    override: str | None = None
    """The `--set` text at fault."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A scalar as it was written."""

    text: str
    style: str
    """Empty for plain, else one of `'`, `"`, `|`, `>`."""


@dataclass(slots=True)
class Document:
    """A parsed text."""

    name: str
    lines: list[str]
    data: Any = None
    keys: dict[FieldPath, Mark] = field(default_factory=dict)
    values: dict[FieldPath, Mark] = field(default_factory=dict)
    scalars: dict[FieldPath, Scalar] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    is_whole: bool = False
    """False when a syntax error or a limit ended parsing: `data` then says nothing."""


class _YamlMark(Protocol):
    """0-based place, as both of PyYAML's parsers give it."""

    line: int
    column: int


class _RefusedError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


def parse_yaml(text: str, *, name: str) -> Document:
    """Parse one document; never raises for what the text says, `problems` holds it."""
    document = Document(name, _LINE_BREAK.split(text))
    try:
        _refuse_unreadable(text)
        # The C parser reads 1 MiB in 0.1 s where the Python one needs 10 s; both refuse the same texts.
        events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        document.data = _Builder(document, events).document()
        document.is_whole = True
    except _RefusedError as refused:
        document.problems.append(refused.problem)
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error, document.lines))
    except yaml.YAMLError as error:
        document.problems.append(Problem((), f"not YAML: {error}", mark=Mark(1, 1)))
    return document


def plain_value(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means."""
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if len(text) < _LONGEST_NUMBER and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def _refuse_unreadable(text: str) -> None:
    if len(text) > MAX_BYTES:
        message = f"{len(text):,} characters are more than the {MAX_BYTES:,} allowed; rows belong into `input.path`"
        raise _RefusedError(Problem((), message, mark=Mark(1, 1)))
    if found := _UNPRINTABLE.search(text):
        before = _LINE_BREAK.split(text[: found.start()])
        mark = Mark(len(before), len(before[-1]) + 1)
        message = f"character U+{ord(found.group()):04X} is not allowed in YAML; remove it"
        raise _RefusedError(Problem((), message, mark=mark))


def _syntax_problem(error: yaml.MarkedYAMLError, lines: list[str]) -> Problem:
    place = error.problem_mark or error.context_mark
    said = " ".join(part for part in (error.context, error.problem) if part)
    hint = next((cure for words, cure in _HINTS if words in said), None)
    mark = _at(place)
    if mark.line <= len(lines) and lines[mark.line - 1][mark.column - 1 :].startswith("\t"):
        hint = "YAML indents with spaces, never with tabs"
    return Problem((), f"not YAML: {error.problem or said}", hint=hint, mark=mark)


def _at(place: _YamlMark | None, width: int = 1) -> Mark:
    return Mark(place.line + 1, place.column + 1, width) if place else Mark(1, 1)


def _mark(event: yaml.Event) -> Mark:
    start, end = event.start_mark, event.end_mark
    is_one_line = isinstance(event, yaml.ScalarEvent) and start and end and start.line == end.line
    return _at(start, max(1, end.column - start.column) if is_one_line and start and end else 1)


class _Builder:
    """Builds data from parser events; never composes nodes, so a bomb costs no more than its text."""

    def __init__(self, document: Document, events: Iterator[yaml.Event]) -> None:
        self._out = document
        self._events = events
        self._num_values = 0

    def document(self) -> Any:
        next(self._events)  # stream start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        data = self._value((), next(self._events), 0)
        next(self._events)  # document end
        following = next(self._events)
        if not isinstance(following, yaml.StreamEndEvent):
            message = "a second document starts here; a spec is one document"
            raise _RefusedError(Problem((), message, mark=_at(following.start_mark)))
        return data

    def _value(self, path: FieldPath, event: yaml.Event, depth: int) -> Any:
        mark = self._out.values[path] = _mark(event)
        self._count(mark, depth)
        self._refuse_features(path, event, mark)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path, event, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path, event, depth)
        return self._scalar(path, event) if isinstance(event, yaml.ScalarEvent) else None

    def _count(self, mark: Mark, depth: int) -> None:
        self._num_values += 1
        if depth > MAX_DEPTH:
            raise _RefusedError(Problem((), f"nested deeper than {MAX_DEPTH} levels", mark=mark))
        if self._num_values > MAX_VALUES:
            raise _RefusedError(
                Problem((), f"more than {MAX_VALUES:,} values; rows belong into `input.path`", mark=mark)
            )

    def _refuse_features(self, path: FieldPath, event: yaml.Event, mark: Mark) -> None:
        if isinstance(event, yaml.AliasEvent):
            message = f"alias `*{event.anchor}` is not allowed; repeat the value"
            hint = 'if `*` is a wildcard, quote it, e.g. "*.parquet"'
            self._out.problems.append(Problem(path, message, hint=hint, mark=mark))
        elif (anchor := getattr(event, "anchor", None)) is not None:
            message = f"anchor `&{anchor}` is not allowed; write the value where it is used"
            self._out.problems.append(Problem(path, message, mark=mark))
        if tag := getattr(event, "tag", None):
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            hint = f'if `{shown}` is part of the text, quote it: "{shown}..."'
            self._out.problems.append(Problem(path, f"tag `{shown}` is not allowed", hint=hint, mark=mark))

    def _scalar(self, path: FieldPath, event: yaml.ScalarEvent) -> Any:
        style = event.style or ""
        self._out.scalars[path] = Scalar(event.value, style)
        return event.value if style else plain_value(event.value)

    def _sequence(self, path: FieldPath, event: yaml.SequenceStartEvent, depth: int) -> list[Any]:
        self._point_at_key(path, is_flow=bool(event.flow_style))
        values: list[Any] = []
        while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value((*path, len(values)), item, depth + 1))
        return values

    def _mapping(self, path: FieldPath, event: yaml.MappingStartEvent, depth: int) -> dict[str, Any]:
        self._point_at_key(path, is_flow=bool(event.flow_style))
        values: dict[str, Any] = {}
        while not isinstance(key_event := next(self._events), yaml.MappingEndEvent):
            key = self._key(path, key_event, depth)
            here = (*path, key)
            if key in values:
                self._skip_duplicate(here, _mark(key_event), depth)
                continue
            self._out.keys[here] = _mark(key_event)
            values[key] = self._value(here, next(self._events), depth + 1)
        return values

    def _point_at_key(self, path: FieldPath, *, is_flow: bool) -> None:
        """A block collection starts on the line after its key; the key is where a reader looks."""
        if not is_flow and path in self._out.keys:
            self._out.values[path] = self._out.keys[path]

    def _key(self, path: FieldPath, event: yaml.Event, depth: int) -> str:
        mark = _mark(event)
        self._count(mark, depth)
        if isinstance(event, yaml.ScalarEvent):
            self._refuse_features(path, event, mark)
            return str(event.value)
        hint = 'if this is a Jinja template, quote it or put it in a block: "{{ column }}"'
        raise _RefusedError(Problem(path, "a mapping, list or alias can't be a key", hint=hint, mark=mark))

    def _skip_duplicate(self, path: FieldPath, mark: Mark, depth: int) -> None:
        first = self._out.keys[path].line
        message = f"`{path[-1]}` is set twice; the first is on line {first}"
        self._out.problems.append(Problem(path, message, hint="keep one of them", mark=mark))
        self._skip(depth + 1)

    def _skip(self, depth: int) -> None:
        """Pass over one value without a trace."""
        outer = depth
        while True:
            event = next(self._events)
            if isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            else:
                self._count(_mark(event), depth)
                depth += isinstance(event, yaml.CollectionStartEvent)
            if depth == outer:
                return
