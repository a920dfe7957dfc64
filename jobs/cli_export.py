"""The command that gives a run's results another form. Parse, call, print, as in `jobs.cli`, whose program it joins."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli_words import AsJson, Output, print_report


def add_export_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command()(export)


def export(
    output: Output,
    openai_batch: Annotated[str, typer.Option(help="Where to write output.jsonl and error.jsonl.", metavar="FOLDER")],
    partial: Annotated[bool, typer.Option("--partial", help="Export a run that isn't finished.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's results as OpenAI's batch API does.

    Example: tramontane export out/batch --openai-batch out/openai
    """
    from jobs.openai_export import export_batch, export_lines

    report = export_batch(output, openai_batch, is_partial=partial)
    print_report(report, export_lines, as_json=as_json)
