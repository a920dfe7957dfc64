"""Commands about machines. Parse, call, print, as in `jobs.cli`, whose program they join."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli_words import AsJson, print_json, print_report, say

FleetName = Annotated[str, typer.Argument(help="A warm fleet's name.", metavar="NAME")]
RayAddress = Annotated[
    str | None, typer.Option("--ray", envvar="RAY_ADDRESS", help="Ray cluster that has it.", metavar="ADDRESS")
]
FleetPath = Annotated[Path, typer.Argument(help="The fleet's YAML file.", metavar="FLEET")]
_TARGETS = "raycluster, rayservice, rayjob, cronjob, raycronjob, ray-up-aws, ray-up-gcp or ray-up-local"


def add_cluster_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (up, down, fleet, manifest, doctor):
        app.command()(command)


def up(fleet: FleetPath, ray: RayAddress = None, as_json: AsJson = False) -> None:
    """Start a warm fleet, and wait for its first replica.

    Example: tramontane up fleet.yaml --ray auto
    """
    from jobs.fleet_file_source import load_fleet_file
    from jobs.fleets import fleet_lines
    from jobs.fleets import up as start

    file = load_fleet_file(fleet)
    status = start(file, ray, say=say)
    print_report(status, fleet_lines, as_json=as_json)
    say(f"use it with `fleet: {{attach: {file.name}}}`; end it with `tramontane down {file.name}`")


def down(name: FleetName, ray: RayAddress = None) -> None:
    """End a warm fleet and free its GPUs.

    Example: tramontane down mixtral --ray auto
    """
    from jobs.fleets import down as end

    print(f"fleet {name} is down, its GPUs are free ({end(name, ray):.1f} s)")


def fleet(name: FleetName, ray: RayAddress = None, as_json: AsJson = False) -> None:
    """Show what a warm fleet serves and how its replicas are.

    Example: tramontane fleet mixtral --ray auto
    """
    from jobs.fleets import fleet_lines, fleet_status

    status = fleet_status(name, ray)
    print_report(status, fleet_lines, as_json=as_json)


def manifest(
    fleet: FleetPath,
    target: Annotated[str, typer.Option(help=f"What to write: {_TARGETS}.", metavar="TARGET")] = "raycluster",
    job: Annotated[
        Path | None, typer.Option(help="Spec of the job that a rayjob or cronjob runs.", metavar="SPEC")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write, instead of standard output.", metavar="FILE")
    ] = None,
) -> None:
    """Write the Kubernetes or `ray up` files of a fleet.

    Example: tramontane manifest fleet.yaml --target rayjob --job job.yaml
    """
    from jobs.manifest import write_manifest

    text = write_manifest(fleet, target=target, job=job, output=output)
    if output is None:
        print(text, end="")
    else:
        say(f"wrote {output}; its first lines say how to use it")


def doctor(
    spec: Annotated[Path | None, typer.Argument(help="A job's YAML file, to check for it too.", metavar="SPEC")] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", envvar="RAY_ADDRESS", help="Ray cluster to check; else one of its own.", metavar="ADDRESS"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find what would make a run fail, with its cure; then exit 2.

    Example: tramontane doctor job.yaml --ray auto
    """
    from jobs.doctor import examine, report
    from jobs.findings import finding_lines

    findings = examine(spec, ray, say=say)
    result = report(findings)
    if as_json:
        print_json(result)
    else:
        print("\n".join(finding_lines(findings)))
    raise typer.Exit(result["exit_code"])
