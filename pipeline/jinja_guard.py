"""Renders the spec's Jinja templates over rows, in a child process that may be killed without harm to anything else.

Owns which rows go to a child and when a new one is started. Knows nothing of chats or tokens, and never runs a template
in this process: here templates are only parsed, which evaluates nothing.

Guarantees:
- one answer per row, in order: its texts, or a RowError.
- a row that runs too long, takes too much memory or kills the child fails alone; its neighbours are rendered.
- values keep their Arrow types: templates see datetimes, Decimals, bytes, lists and dicts.
- text in a row is never taken for a template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.meta import TrackingCodeGenerator

from pipeline import jinja_child
from pipeline.errors import RowError, SpecError
from pipeline.jinja_process import STAGE, RenderLimits, RenderProcess, crashed

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK_BYTES = 8 << 20
_CHUNK_ROWS = 1024
# A row takes the child about three times its size; larger ones would only be sent to fail there.
_ROW_BYTES = 96 << 20
# After so many rows in succession that had to be killed (2 s each) the rest of the batch gets a twentieth of the time:
# 4,096 of them would take more than two hours before the run could notice that its template is no good. Good rows take
# 10 microseconds, so neighbours of exploding rows aren't touched by it.
_PATIENCE = 5
_IMPATIENCE = 20


class _Columns(TrackingCodeGenerator):
    """Jinja's analysis of undeclared names, without the constant folding that would run `{{ 'a' * 10**9 }}` here."""

    def _output_child_to_const(self, *_args: Any) -> str:
        raise nodes.Impossible


def template_columns(text: str) -> set[str]:
    """Return the names that a template takes from the row. Evaluates nothing.

    Raises:
        SpecError: the template can't be parsed; the message names the line.
    """
    environment = jinja_child.template_environment()
    try:
        tree = jinja_child.parse_template(environment, text)
        columns = _Columns(environment)
        columns.optimizer = None
        columns.visit(tree)
    except TemplateError as error:
        line = getattr(error, "lineno", None) or 1
        raise SpecError(f"template line {line}: {error}; see the Jinja documentation for the syntax") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"template can't be parsed: {type(error).__name__}: {error}; simplify it") from error
    return columns.undeclared_identifiers


def has_expressions(text: str) -> bool:
    """Whether Jinja would change anything about `text`; if not it needs no rendering."""
    return any(mark in text for mark in ("{{", "{%", "{#"))


class GuardedRenderer:
    """Renders a fixed set of templates over tables; not thread-safe. Close it, or drop it, to end the child."""

    def __init__(self, templates: Sequence[str], limits: RenderLimits | None = None) -> None:
        """Start the child and compile.

        Raises:
            SpecError: a template can't be parsed, or can't be compiled within the limits.
        """
        self._templates = tuple(templates)
        self._limits = limits or RenderLimits()
        self.columns = frozenset[str]().union(*(template_columns(text) for text in templates))
        self._strikes = 0
        self._child: RenderProcess | None = None
        try:
            self._running_child()
        except RowError as error:
            raise SpecError(f"template can't be compiled: {error.message}; make it smaller") from error

    def close(self) -> None:
        """End the child; a later `render` starts another."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def render(self, table: pa.Table) -> list[list[str] | RowError]:
        """Return per row the texts of all templates, in their order, or why they can't be had.

        `table` may hold other columns too. One that a template uses and that isn't there fails every row which uses it.
        """
        answers: list[list[str] | RowError] = []
        if self._strikes >= _PATIENCE:
            self._strikes = 0
            self.close()  # the next child has all the time again
        # A column that is there wins over Jinja's global of that name, which no analysis can tell it from.
        present = [name for name in table.column_names if name in self.columns or name in jinja_child.GLOBALS]
        for chunk in _chunks(_plain(table.select(present), table.num_rows)):
            self._render_chunk(chunk, answers)
        return answers

    def _render_chunk(self, chunk: pa.Table, answers: list[list[str] | RowError]) -> None:
        if chunk.nbytes > _ROW_BYTES:
            message = f"the row's {chunk.nbytes >> 20} MiB are more than the {_ROW_BYTES >> 20} MiB a template may read"
            answers.append(RowError("template_memory", message, STAGE))
            return
        start, end = len(answers), len(answers) + chunk.num_rows
        while len(answers) < end:
            try:
                for answer in self._running_child().render(chunk.slice(len(answers) - start)):
                    answers.append(answer)
                    self._strikes = self._strikes if self._strikes >= _PATIENCE else 0
            except (RowError, OSError) as error:
                answers.append(self._strike(error))

    def _strike(self, error: Exception) -> RowError:
        """Forget the dead child; return the failure of the row that it died of."""
        self.close()
        self._strikes += 1
        return error if isinstance(error, RowError) else crashed(f"can't be started: {error}")

    def _running_child(self) -> RenderProcess:
        if self._child is None:
            hurry = _IMPATIENCE if self._strikes >= _PATIENCE else 1
            child = RenderProcess(self._templates, replace(self._limits, timeout_s=self._limits.timeout_s / hurry))
            child.compiled()
            self._child = child
        return self._child


def _plain(table: pa.Table, num_rows: int) -> pa.Table:
    """Cast nanoseconds to microseconds, all that Python's datetime holds; give a table without columns its rows."""
    import pyarrow as pa

    if table.num_columns == 0:
        return pa.table({"_tm_none": pa.nulls(num_rows)})
    for index, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            micros = table.column(index).cast(pa.timestamp("us", tz=field.type.tz), safe=False)
            table = table.set_column(index, field.name, micros)
    return table


def _chunks(table: pa.Table) -> Iterator[pa.Table]:
    """Cut so that a chunk takes little of the child's memory; a single row may still be larger."""
    if table.num_rows == 0:
        return
    if table.num_rows > 1 and (table.nbytes > _CHUNK_BYTES or table.num_rows > _CHUNK_ROWS):
        middle = table.num_rows // 2
        yield from _chunks(table.slice(0, middle))
        yield from _chunks(table.slice(middle))
    else:
        yield table
