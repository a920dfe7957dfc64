"""Commands that hold results against each other or the truth. Parse, call, print, as in `jobs.cli`, whose program they
join.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli_words import AsJson, Output, print_report


def add_compare_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (drift, calibrate, diff):
        app.command()(command)


def drift(a: Output, b: Output, as_json: AsJson = False) -> None:
    """Compare which experts two outputs used, layer by layer.

    Example: tramontane drift out/monday out/tuesday
    """
    from jobs.drift import drift_lines, read_drift

    report = read_drift(a, b)
    print_report(report, drift_lines, as_json=as_json)


def calibrate(
    output: Output,
    gold: Annotated[str, typer.Option(help="Column of the output with each row's true label.", metavar="COLUMN")],
    plot: Annotated[
        Path | None, typer.Option(help="Also write the reliability diagram there, as SVG.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare labels with true ones, and fit the temperature.

    Example: tramontane calibrate out/labels --gold true_label
    """
    from jobs.calibrate import calibration_lines, read_calibration, reliability_svg, write_plot

    report = read_calibration(output, gold)
    if plot is not None:
        write_plot(plot, reliability_svg(report))
    print_report(report, calibration_lines, as_json=as_json)


def diff(
    run1: Annotated[str, typer.Argument(help="A run's output, or an incremental job's.", metavar="RUN1")],
    run2: Annotated[
        str | None, typer.Argument(help="The run to compare with it; else its last two runs.", metavar="RUN2")
    ] = None,
    spec: Annotated[str | None, typer.Option(help="Spec with the limits; else RUN2's own.", metavar="SPEC")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two runs' labels, lengths and routing; exit 1 on drift.

    Example: tramontane diff out/tickets
    """
    from jobs.run_diff import read_diff
    from jobs.run_diff_text import diff_lines

    report = read_diff(run1, run2, spec=spec)
    print_report(report, diff_lines, as_json=as_json)
    raise typer.Exit(report["exit_code"])
