"""The command that compares two runs. Parse, call, print, as in `jobs.cli`, whose program it joins."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def add_diff_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command()(diff)


def diff(
    run1: Annotated[str, typer.Argument(help="A run's output, or an incremental job's.", metavar="RUN1")],
    run2: Annotated[
        str | None, typer.Argument(help="The run to compare with it; else its last two runs.", metavar="RUN2")
    ] = None,
    spec: Annotated[str | None, typer.Option(help="Spec with the limits; else RUN2's own.", metavar="SPEC")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Compare two runs' labels, lengths and routing; exit 1 on drift.

    Example: tramontane diff out/tickets
    """
    from jobs.run_diff import read_diff
    from jobs.run_diff_text import diff_lines

    report = read_diff(run1, run2, spec=spec)
    print(json.dumps(report, indent=1, ensure_ascii=False) if as_json else "\n".join(diff_lines(report)))
    raise typer.Exit(report["exit_code"])
