"""Commands about when to run. Parse, call, print, as in `jobs.cli`, whose program they join."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli_words import Overrides, SpecPath, say

Timezone = Annotated[str, typer.Option("--timezone", help="Of the times, an IANA name.", metavar="ZONE")]


def add_schedule_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(schedule)
    # What follows the expression is another command, with options of its own.
    app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(tick)


def schedule(
    spec: SpecPath,
    cron: Annotated[str, typer.Option("--cron", help="Minute, hour, day, month, weekday.", metavar="CRON")],
    on: Annotated[
        str, typer.Option("--on", help="kubernetes, crontab, systemd, airflow or dagster.", metavar="SCHEDULER")
    ],
    timezone: Timezone = "Etc/UTC",
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Submit to that cluster, instead of running.", metavar="URL")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", help="With --address, as of `submit`.", metavar="NAME=VALUE"),
    ] = None,
    fleet: Annotated[
        Path | None, typer.Option("--fleet", help="On kubernetes: the fleet's YAML file.", metavar="FLEET")
    ] = None,
    raycronjob: Annotated[
        bool, typer.Option("--raycronjob", help="On kubernetes: KubeRay's own, which is alpha.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write to, not standard output.", metavar="FOLDER")
    ] = None,
) -> None:
    """Print what a scheduler needs to run a job by the clock.

    Example: tramontane schedule job.yaml --cron "0 2 * * *" --on systemd
    """
    from jobs.schedule import Wish, parse_schedule, schedule_files, schedule_notes, write_files

    parsed = parse_schedule(cron, timezone)
    wish = Wish(spec, parsed, on, overrides or (), address, env or (), fleet, raycronjob)
    files = schedule_files(wish)
    for line in schedule_notes(parsed, datetime.now(UTC)):
        say(line)
    if output is not None:
        for path in write_files(files, output):
            say(f"wrote {path}; its first lines say how to use it")
    else:
        print("\n".join(files.values()), end="")


def tick(
    cron: Annotated[str, typer.Argument(help="Minute, hour, day, month, weekday.", metavar="CRON")],
    command: Annotated[
        list[str] | None, typer.Argument(help="Run that, e.g. `run job.yaml`, {tick} filled in.", metavar="COMMAND")
    ] = None,
    timezone: Timezone = "Etc/UTC",
) -> None:
    """Print when a schedule was due last, in UTC, or run for it.

    Example: tramontane tick --timezone Europe/Paris "0 2 * * *"
    """
    from jobs.cli import app
    from jobs.cron import parse_schedule, tick_name
    from jobs.schedule_texts import TICK

    due = tick_name(parse_schedule(cron, timezone).latest(datetime.now(UTC)))
    if not command:
        print(due)
    else:
        app([word.replace(TICK, due) for word in command])
