"""The command line: parse, call, print. Decides nothing, and imports what a command needs only when it runs."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli_cluster import add_cluster_commands
from jobs.cli_compare import add_compare_commands
from jobs.cli_export import add_export_command
from jobs.cli_schedule import add_schedule_commands
from jobs.cli_serve import add_serve_commands
from jobs.cli_submit import add_submit_commands, print_job_status
from jobs.cli_words import AsJson, Output, Overrides, SpecPath, print_json, print_report, say

app = typer.Typer(
    name="tramontane",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

OfCluster = Annotated[
    str | None, typer.Option("--address", help="The job OUTPUT of that cluster, by its id or spec.", metavar="URL")
]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", envvar="RAY_ADDRESS", help="Ray cluster to work in; else one of its own.", metavar="ADDRESS"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress.")]


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

    summary = run_demo(output, rows=rows, say=say)
    if as_json:
        print_json(summary)
    elif summary["exit_code"] == 0:
        print("\n".join(demo_tables(output)))
    raise typer.Exit(summary["exit_code"])


@app.command()
def init(
    path: Annotated[
        Path | None, typer.Argument(help="File to write; job.yaml, or the example's name.", metavar="[SPEC]")
    ] = None,
    example: Annotated[
        str | None, typer.Option(help="Copy a complete job: tickets, pairs or translation.", metavar="NAME")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Write a commented spec to start from, or a whole example.

    Example: tramontane init labels.yaml
    """
    from jobs.init_files import example_files, spec_file, write_files

    path = path or Path("job.yaml" if example is None else f"{example}.yaml")
    files = spec_file(path) if example is None else example_files(example, path)
    write_files(files, force=force)
    shown = shlex.quote(str(path))
    first = "edit it" if example is None else "read it"
    written = " and ".join(str(file) for file in files)
    say(f"wrote {written}; next: {first}, then `tramontane validate {shown}` and `tramontane run {shown}`")


@app.command()
def validate(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a spec without touching input, model or cluster.

    Example: tramontane validate job.yaml --set sampling.temperature=0
    """
    from jobs.spec import load_spec

    job = load_spec(spec, overrides or [])
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        print(f"{spec}: valid")


@app.command()
def plan(
    spec: SpecPath,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=1, help="Rows to tokenize; smaller inputs are exact.", metavar="N")] = 2000,
    assume: Annotated[
        list[str] | None, typer.Option(help="Plan for GPUs that may not be there.", metavar="TYPE:GPUSxNODES")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", envvar="RAY_ADDRESS", help="Ray cluster to plan for.", metavar="ADDRESS")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do, and take on GPUs; touches nothing.

    Example: tramontane plan job.yaml --assume H100-80G:8x4
    """
    from jobs.estimate import estimate, estimate_lines, machines_of
    from jobs.prepare import prepare
    from jobs.spec import load_spec

    loaded = load_spec(spec, overrides or [])
    machines = machines_of(loaded, assume or [], ray)
    report = estimate(prepare(loaded, weights=False), sample_rows=sample, machines=machines)
    print_report(report, estimate_lines, as_json=as_json)


@app.command()
def preview(
    spec: SpecPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows, spread over the input.", metavar="N")] = 10,
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Answer a few rows and print them; the output stays as it is.

    Example: tramontane preview job.yaml -n 5
    """
    from jobs.prepare import prepare
    from jobs.preview import preview_lines, run_preview
    from jobs.spec import load_spec

    report = run_preview(prepare(load_spec(spec, overrides or [])), num_rows=rows, say=say, ray=ray)
    print_report(report, preview_lines, as_json=as_json)
    raise typer.Exit(report["exit_code"])


@app.command()
def run(
    spec: SpecPath,
    overrides: Overrides = None,
    no_retry_failed: Annotated[
        bool, typer.Option("--no-retry-failed", help="Leave rows alone that failed in an earlier execution.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Incremental: go on with settings that changed.")
    ] = False,
    ray: RayAddress = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a job, or continue it where it stopped.

    Example: tramontane run job.yaml
    """
    from jobs.run import RunOptions

    options = RunOptions(retry_failed=not no_retry_failed, accept_changes=accept_changes, quiet=quiet, ray=ray)
    _run(spec, overrides, options, as_json=as_json)


@app.command()
def retry(
    spec: SpecPath,
    overrides: Overrides = None,
    status: Annotated[
        list[str] | None, typer.Option(help="Rows with this status instead of `failed`.", metavar="STATUS")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only rows with this error kind.", metavar="KIND")] = None,
    ray: RayAddress = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do failed rows again and rewrite just their parts.

    Example: tramontane retry job.yaml --kind engine_crash
    """
    from jobs.run import RunOptions
    from pipeline.errors import ERROR_KINDS, INVALID_JSON, SpecError
    from pipeline.rows import STATUSES

    statuses = tuple(status or ("failed",))
    unknown = [name for name in statuses if name not in STATUSES]
    if unknown:
        raise SpecError(f"--status {unknown[0]!r} is unknown; use one of {', '.join(STATUSES)}")
    kinds = tuple(kind) if kind else None
    for name in kinds or ():
        if name == INVALID_JSON:
            raise SpecError(f"--kind {name!r} is of rows that are invalid, not failed; use `--status invalid`")
        if name not in ERROR_KINDS:
            raise SpecError(f"--kind {name!r} is unknown; use one of {', '.join(sorted(ERROR_KINDS))}")
    options = RunOptions(only_failed=True, statuses=statuses, kinds=kinds, quiet=quiet, ray=ray)
    _run(spec, overrides, options, as_json=as_json)


@app.command()
def status(
    output: Output,
    address: OfCluster = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a run is, from its files or its cluster.

    Example: tramontane status out/demo/result
    """
    from jobs.status import read_status, status_lines

    if address is not None:
        print_job_status(output, address, as_json=as_json)
        return
    report = read_status(output)
    print_report(report, status_lines, as_json=as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a spec, for editors.

    Example: tramontane schema
    """
    from jobs.spec import spec_json_schema

    print_json(spec_json_schema())


add_cluster_commands(app)
add_compare_commands(app)
add_export_command(app)
add_submit_commands(app)
add_serve_commands(app)
add_schedule_commands(app)


def _run(spec: Path, overrides: list[str] | None, options: Any, *, as_json: bool) -> None:
    from jobs.report import closing_lines
    from jobs.spec import load_spec
    from jobs.whole_job import run_whole

    began = datetime.now(UTC)
    settings = [word for override in overrides or [] for word in ("--set", override)]

    def close(job: Any, summary: Any) -> None:
        for line in closing_lines(job, summary, spec_words=[str(spec), *settings], began=began):
            say(line)

    summary = run_whole(load_spec(spec, overrides or []), options, say=say, finished=close)
    if as_json:
        print_json(summary)
    raise typer.Exit(summary["exit_code"])
