"""What the commands share: arguments and options that mean the same everywhere, and how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

SpecPath = Annotated[Path, typer.Argument(help="The job's YAML file.", metavar="SPEC")]
Output = Annotated[str, typer.Argument(help="A run's output directory or URL, or its spec.", metavar="OUTPUT")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field, e.g. sampling.temperature=0", metavar="FIELD=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def say(line: str) -> None:
    """Tell a person something, on standard error."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a report for programs, on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_report(report: Any, lines: Callable[[Any], Iterable[str]], *, as_json: bool) -> None:
    """Print a report for programs, or as the lines that it is to people."""
    if as_json:
        print_json(report)
    else:
        print("\n".join(lines(report)))
