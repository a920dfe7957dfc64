"""Commands about the endpoint. Parse, call, print, as in `jobs.cli`, whose program they join."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli_words import say

_FLEET = "A warm fleet's name, or a fleet's YAML file."


def add_serve_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (serve, key):
        app.command()(command)


def serve(
    fleet: Annotated[str | None, typer.Argument(help=_FLEET, metavar="FLEET")] = None,
    attach: Annotated[
        str | None, typer.Option(help="A warm fleet's name, whatever files there are.", metavar="NAME")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", envvar="RAY_ADDRESS", help="Ray cluster; a file can do without.", metavar="ADDRESS"),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not given.", metavar="HOST")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000 if not given.", metavar="PORT")] = None,
    keys: Annotated[Path | None, typer.Option(help="File with hashes of API keys.", metavar="FILE")] = None,
    batches: Annotated[
        Path | None, typer.Option(help="Where OpenAI's files and batches are kept.", metavar="DIRECTORY")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Most requests of each key in a minute.", metavar="N")
    ] = None,
) -> None:
    """Answer OpenAI's API with a warm fleet, until Ctrl-C.

    Example: tramontane serve mixtral --ray auto --port 8000
    """
    from jobs.serve import plan_endpoint
    from jobs.serve import serve as start
    from pipeline.errors import SpecError

    if (fleet is None) == (attach is None):
        raise SpecError("name one fleet: `tramontane serve FLEET`, or `--attach NAME` for a warm one")
    changes = {"host": host, "port": port, "keys": keys, "batches": batches}
    changes |= {"requests_per_minute": requests_per_minute}
    start(plan_endpoint(fleet, ray, attach=attach, **changes), say=say)


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.", metavar="NAME")],
    keys: Annotated[Path, typer.Option(help="File to add its hash to.", metavar="FILE")],
) -> None:
    """Make an API key, print it once, and keep its hash.

    Example: tramontane key alice --keys keys.txt
    """
    from cluster.serve_keys import add_key

    print(add_key(keys, name))
    say(f"its hash is in {keys}; the key can't be shown again")
