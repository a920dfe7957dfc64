"""On the cluster: what a submitted job does there. Checks both ends, then runs the spec under its submission's id.

    python -m jobs.submitted ID SPEC [--set FIELD=VALUE]... [--no-check] [--no-retry-failed]

Its working directory is the folder that was sent (`jobs.job_package`); the libraries are the image's own.
Guarantees:
- what would make the run fail ends it with exit code 2 before an engine starts or weights are fetched.
- the exit code is the run's; of secrets it prints names, never values.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.advisories import installed_versions
from jobs.doctor import examine_job
from jobs.findings import Finding, exit_code, finding_lines, fine
from jobs.interrupts import Interrupts
from jobs.job_package import Submitter, read_submitter
from jobs.job_spec import JobSpec
from jobs.main import main
from jobs.ray_findings import OPEN_TO_ALL
from jobs.ray_session import ray_session
from jobs.spec import load_spec

ANSWER_TIMEOUT_S = 60.0


def run_submitted() -> None:
    """Check, then run; ends the process with the run's exit code."""
    arguments = _arguments()
    spec = load_spec(arguments.spec, arguments.set)
    interrupts = Interrupts()
    # Ray gives the driver of a job the address of the job's own cluster.
    with interrupts.heard(), ray_session(os.environ["RAY_ADDRESS"]):
        interrupts.install()  # `ray.init` has put a SIGTERM handler of its own in place
        if arguments.check:
            findings = check_both_ends(spec, read_submitter(Path.cwd()))
            _say("\n".join(finding_lines(findings)))
            if exit_code(findings):
                _say("error: the run would fail, so it wasn't started; correct the problems above and submit it again")
                raise SystemExit(2)
        raise SystemExit(_run(spec, arguments))


def check_both_ends(spec: JobSpec, submitter: Submitter) -> list[Finding]:
    """What `doctor` finds here with this spec, and whether this cluster fits who submitted it; inside Ray."""
    found = version_findings(submitter, installed_versions(), _installed(submitter.requirements))
    found += reference_findings(submitter.references, _empty_variables(sorted(submitter.references)))
    for finding in examine_job(spec, os.environ["RAY_ADDRESS"], say=_say):
        # A cluster that asks for no token endangers its owner; it doesn't make the run fail.
        is_access = finding.level == "problem" and OPEN_TO_ALL in finding.found
        found.append(replace(finding, level="warning") if is_access else finding)
    return found


def version_findings(
    submitter: Submitter, here: Mapping[str, str], installed: Mapping[str, str | None]
) -> list[Finding]:
    """Whether the image has what the code that was sent needs, and where it differs from the submitter's. Pure.

    Args:
        submitter: the other end.
        here: versions of what the doctor looks at.
        installed: of each of the submitter's requirements by name; None where it isn't there.
    """
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, submitter.requirements):
        number = installed[requirement.name]
        if number is None or not requirement.specifier.contains(number, prereleases=True):
            said = f"the code that was sent needs {requirement}, and the cluster's image has {number or 'none'}"
            cure = "use an image made from this version (cluster/image), or submit with the version of the image"
            found.append(Finding("problem", "versions", said, cure))
    differing = [
        f"{name} {theirs} there and {here[name]} here"
        for name, theirs in submitter.versions.items()
        if here.get(name, theirs) != theirs
    ]
    if _minor(submitter.python) != _minor(platform.python_version()):
        differing.append(f"Python {submitter.python} there and {platform.python_version()} here")
    if differing:
        cure = "nothing, if the run was not tried out there; results may differ from what was seen there"
        found.append(Finding("warning", "versions", f"submitted from another set: {', '.join(differing)}", cure))
    if not found:
        found.append(fine("versions", "the cluster has what the submitting machine has"))
    return found


def reference_findings(references: Mapping[str, Sequence[str]], empty: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Whether what the job's variables refer to is there. Pure; names only.

    Args:
        references: variable to the names that it is filled from.
        empty: node to the variables that are empty there.
    """
    found = []
    for variable, names in references.items():
        lacking = [node for node, variables in empty.items() if variable in variables]
        if lacking:
            said = f"{variable} is to come from {', '.join(names)}, which {', '.join(lacking)} doesn't have"
            cure = "add it to cluster.secrets of the fleet file, or set it for `ray start` on every node"
            found.append(Finding("problem", "secrets", said, cure))
        else:
            found.append(fine("secrets", f"{variable} comes from {', '.join(names)} on every node"))
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.submitted")
    parser.add_argument("id")
    parser.add_argument("spec")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--no-check", dest="check", action="store_false")
    parser.add_argument("--no-retry-failed", dest="retry_failed", action="store_false")
    return parser.parse_args()


def _run(spec: JobSpec, arguments: argparse.Namespace) -> int:
    from jobs.report import closing_lines
    from jobs.run import RunOptions
    from jobs.whole_job import run_whole

    began = datetime.now(UTC)

    def close(job: Any, summary: Any) -> None:
        for line in closing_lines(job, summary, spec_words=[], began=began)[:-1]:  # what to do next, `submit` says
            _say(line)

    options = RunOptions(retry_failed=arguments.retry_failed, ray=os.environ["RAY_ADDRESS"], run_id=arguments.id)
    return int(run_whole(spec, options, say=_say, finished=close)["exit_code"])


def _installed(requirements: Sequence[str]) -> dict[str, str | None]:
    from packaging.requirements import Requirement

    found: dict[str, str | None] = {}
    for name in (Requirement(text).name for text in requirements):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _empty_variables(names: Sequence[str]) -> dict[str, list[str]]:
    """By node, which of these variables are empty in a worker's environment there."""
    if not names:
        return {}
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.nodes import read_nodes
    from jobs.ray_findings import name_nodes

    task = ray.remote(empty_here)
    asked = {}
    for node_name, node in name_nodes(read_nodes()).items():
        here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        asked[task.options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(list(names))] = node_name
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    # A node that says nothing is `doctor`'s to report.
    return {asked[reference]: ray.get(reference) for reference in answered}


def empty_here(names: Sequence[str]) -> list[str]:
    """Which of these variables this process lacks."""
    return [name for name in names if not os.environ.get(name)]


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(run_submitted)
