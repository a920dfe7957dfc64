"""The command line: parse, call, print. Decides nothing, and imports what a command needs only when it runs."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import RunError

app = typer.Typer(
    name="tramontane",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecPath = Annotated[Path, typer.Argument(help="The job's YAML file.", metavar="SPEC")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field, e.g. sampling.temperature=0", metavar="FIELD=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress.")]


def main() -> None:
    """Entry point; turns a RunError into its message and exit code, and has a word to say when interrupted."""
    try:
        app()
    except RunError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        # Typer turns Ctrl-C into this. Once rows are being done, `jobs.supervise` handles it, so none is yet.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            print("interrupted before any row was done; rerun the same command", file=sys.stderr)
        raise
    except Exception as error:  # noqa: BLE001
        # The last boundary: Python's own exit code 1 would read as "done, with too many failed rows".
        traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}; committed rows are safe; rerun", file=sys.stderr)
        sys.exit(3)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tramontane {version('tramontane')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Offline inference for Mixtral-family mixture-of-experts models: rows in, rows out.

    Example: tramontane demo
    """


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for prompts, spec and results.", metavar="DIRECTORY")] = Path(
        "out/demo"
    ),
    rows: Annotated[int, typer.Option(min=1, help="Chat prompts to answer.", metavar="N")] = 200,
    as_json: AsJson = False,
) -> None:
    """Answer 200 chat prompts with a tiny Mixtral.

    Example: tramontane demo
    """
    from jobs.demo import demo_tables, run_demo

    summary = run_demo(output, rows=rows, say=_say)
    if as_json:
        _print_json(summary)
    elif summary["exit_code"] == 0:
        print("\n".join(demo_tables(output)))
    raise typer.Exit(summary["exit_code"])


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.", metavar="SPEC")] = Path("job.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented spec to start from.

    Example: tramontane init labels.yaml
    """
    from jobs.init_template import init_template
    from pipeline.errors import SpecError

    if path.exists() and not force:
        raise SpecError(f"{path} exists; choose another name, or overwrite it with --force")
    try:
        path.write_text(init_template(name=path.stem), encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path} can't be written: {error.strerror}; choose a file in a folder that exists") from None
    shown = shlex.quote(str(path))
    _say(f"wrote {path}; next: edit it, then `tramontane validate {shown}` and `tramontane run {shown}`")


@app.command()
def validate(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a spec without touching input, model or cluster.

    Example: tramontane validate job.yaml --set sampling.temperature=0
    """
    from jobs.spec import load_spec

    job = load_spec(spec, overrides or [])
    if as_json:
        _print_json(job.model_dump(mode="json"))
    else:
        print(f"{spec}: valid")


@app.command()
def plan(
    spec: SpecPath,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=1, help="Rows to tokenize; smaller inputs are exact.", metavar="N")] = 2000,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do; touches nothing.

    Example: tramontane plan job.yaml
    """
    from jobs.estimate import estimate, estimate_lines
    from jobs.prepare import prepare
    from jobs.spec import load_spec

    report = estimate(prepare(load_spec(spec, overrides or []), weights=False), sample_rows=sample)
    if as_json:
        _print_json(report)
    else:
        print("\n".join(estimate_lines(report)))


@app.command()
def preview(
    spec: SpecPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows, spread over the input.", metavar="N")] = 10,
    as_json: AsJson = False,
) -> None:
    """Answer a few rows and print them; the output stays as it is.

    Example: tramontane preview job.yaml -n 5
    """
    from jobs.prepare import prepare
    from jobs.preview import preview_lines, run_preview
    from jobs.spec import load_spec

    report = run_preview(prepare(load_spec(spec, overrides or [])), num_rows=rows, say=_say)
    if as_json:
        _print_json(report)
    else:
        print("\n".join(preview_lines(report)))
    raise typer.Exit(report["exit_code"])


@app.command()
def run(
    spec: SpecPath,
    overrides: Overrides = None,
    no_retry_failed: Annotated[
        bool, typer.Option("--no-retry-failed", help="Leave rows alone that failed in an earlier execution.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a job, or continue it where it stopped.

    Example: tramontane run job.yaml
    """
    from jobs.run import RunOptions

    _run(spec, overrides, RunOptions(retry_failed=not no_retry_failed, quiet=quiet), as_json=as_json)


@app.command()
def retry(
    spec: SpecPath,
    overrides: Overrides = None,
    status: Annotated[
        list[str] | None, typer.Option(help="Rows with this status instead of `failed`.", metavar="STATUS")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only rows with this error kind.", metavar="KIND")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do failed rows again and rewrite just their parts.

    Example: tramontane retry job.yaml --kind engine_crash
    """
    from jobs.run import RunOptions
    from pipeline.errors import SpecError
    from pipeline.rows import STATUSES

    statuses = tuple(status or ("failed",))
    unknown = [name for name in statuses if name not in STATUSES]
    if unknown:
        raise SpecError(f"--status {unknown[0]!r} is unknown; use one of {', '.join(STATUSES)}")
    options = RunOptions(only_failed=True, statuses=statuses, kinds=tuple(kind) if kind else None, quiet=quiet)
    _run(spec, overrides, options, as_json=as_json)


@app.command()
def status(
    output: Annotated[str, typer.Argument(help="The run's output directory or URL, or its spec.", metavar="OUTPUT")],
    as_json: AsJson = False,
) -> None:
    """Show how far a run is, from its files alone.

    Example: tramontane status out/demo/result
    """
    from jobs.status import read_status, status_lines

    report = read_status(output)
    if as_json:
        _print_json(report)
    else:
        print("\n".join(status_lines(report)))


def _run(spec: Path, overrides: list[str] | None, options: Any, *, as_json: bool) -> None:
    from jobs.prepare import prepare
    from jobs.report import closing_lines, id_warnings
    from jobs.run import run_job
    from jobs.spec import load_spec

    began = datetime.now(UTC)
    job = prepare(load_spec(spec, overrides or []))
    for line in id_warnings(job):
        _say(line)
    summary = run_job(job, options, say=_say)
    settings = [word for override in overrides or [] for word in ("--set", override)]
    for line in closing_lines(job, summary, spec_words=[str(spec), *settings], began=began):
        _say(line)
    if as_json:
        _print_json(summary)
    raise typer.Exit(summary["exit_code"])


if __name__ == "__main__":
    main()
