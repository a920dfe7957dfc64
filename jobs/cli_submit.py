"""Commands about runs on a cluster. Parse, call, print, as in `jobs.cli`, whose program they join."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.cli_words import AsJson, Overrides, SpecPath, print_json, say

JobWord = Annotated[str, typer.Argument(help="A job's id on the cluster, or its spec.", metavar="JOB")]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        help="URL of the cluster's dashboard, http://HEAD:8265.",
        metavar="URL",
    ),
]


def add_submit_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (submit, logs, stop):
        app.command()(command)
    app.command("list")(list_jobs)


def submit(
    spec: SpecPath,
    address: Address,
    overrides: Overrides = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", help="NAME=value, or NAME='${env:NAME}' of the cluster.", metavar="NAME=VALUE"),
    ] = None,
    job_id: Annotated[
        str | None, typer.Option("--id", help="Instead of the id made of name and output.", metavar="ID")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is submitted.")] = False,
    attach: Annotated[bool, typer.Option("--attach", help="Follow the run if it is there already.")] = False,
    driver_cpus: Annotated[
        float,
        typer.Option("--driver-cpus", min=0, help="CPUs for the driver, on any node; 0: on the head.", metavar="N"),
    ] = 0,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Run at once, without a look at cluster and spec.")
    ] = False,
    no_retry_failed: Annotated[
        bool, typer.Option("--no-retry-failed", help="Leave rows alone that failed in an earlier execution.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a job on a cluster, and follow it; Ctrl-C detaches.

    Example: tramontane submit job.yaml --address http://head:8265
    """
    from jobs.ray_jobs import JobsApi
    from jobs.submit import Submission, follow_to_the_end, job_as_data
    from jobs.submit import submit as start

    jobs = JobsApi(address)
    submission = Submission(
        spec,
        overrides or (),
        env or (),
        job_id,
        check=not no_check,
        retry_failed=not no_retry_failed,
        driver_cpus=driver_cpus,
        attach=attach,
    )
    job = start(jobs, submission)
    say(f"{job.id} is {job.state} at {jobs.address}; its output is {job.output}")
    exit_code = 0
    if detach:
        say(f"follow it: tramontane logs {job.id} -f --address {jobs.address}")
    else:
        ended, exit_code = follow_to_the_end(jobs, job.id, write=_write_log, say=say)
        job = ended or job
    if as_json:
        print_json(job_as_data(job))
    raise typer.Exit(exit_code)


def logs(
    job: JobWord,
    address: Address,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends; exit as it did.")] = False,
) -> None:
    """Print what a job on a cluster says; -f follows it.

    Example: tramontane logs job.yaml -f --address http://head:8265
    """
    from jobs.ray_jobs import JobsApi
    from jobs.submit import find, follow_to_the_end

    jobs = JobsApi(address)
    job_id = find(jobs, job).id
    if follow:
        raise typer.Exit(follow_to_the_end(jobs, job_id, write=_write, say=say)[1])
    _write(jobs.logs(job_id))


def stop(job: JobWord, address: Address) -> None:
    """Have a job on a cluster commit what is begun, and end.

    Example: tramontane stop job.yaml --address http://head:8265
    """
    from jobs.ray_jobs import JobsApi
    from jobs.submit import ending_lines, find
    from jobs.submit import stop as end

    jobs = JobsApi(address)
    for line in ending_lines(end(jobs, find(jobs, job), say=say)):
        say(line)


def list_jobs(
    address: Address,
    everything: Annotated[bool, typer.Option("--all", help="Jobs of other programs too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs that were submitted to a cluster.

    Example: tramontane list --address http://head:8265
    """
    from jobs.ray_jobs import JobsApi
    from jobs.submit import job_as_data, job_lines

    found = [job for job in JobsApi(address).jobs().values() if everything or job.name is not None]
    if as_json:
        print_json([job_as_data(job) for job in found])
    else:
        print("\n".join(job_lines(found)))


def print_job_status(word: str, address: str, *, as_json: bool) -> None:
    """What `status --address` prints: the job's state, and what its output says, where that can be read from here."""
    from jobs.ray_jobs import JobsApi
    from jobs.submit import find, job_as_data, job_lines, output_status

    job = find(JobsApi(address), word)
    report, lines = output_status(job)
    if as_json:
        print_json({**job_as_data(job), "run": report})
    else:
        print("\n".join([*job_lines([job]), *lines]))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_log(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
