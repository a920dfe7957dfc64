"""`doctor`: what would make a run fail or waste its machines, found before it starts, each with its cure.

Writes nothing but a probe into the output, which it takes away again; starts no engine and fetches no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.nodes import Node, can_grow, fitting, read_nodes
from cluster.pools import PoolPlan
from jobs.findings import Finding, exit_code, refusal
from jobs.fleet_findings import attach_finding, pool_findings, warm_fleet_findings
from jobs.gpu_findings import fit_findings, gpu_findings
from jobs.job_spec import JobSpec
from jobs.node_facts import read_node_facts
from jobs.node_findings import Needs, node_findings
from jobs.ray_findings import (
    address_finding,
    ask_nodes,
    auth_findings,
    name_nodes,
    silence_findings,
    unreachable_finding,
)
from jobs.ray_session import ray_session
from jobs.spec import load_spec
from jobs.spec_findings import KnownJob, spec_findings
from pipeline.errors import RunError


def examine(spec: Path | None, ray: str | None, *, say: Callable[[str], None]) -> list[Finding]:
    """Look at everything that a run of this spec needs, or, without one, at Ray and the machines alone.

    Raises:
        SpecError: the spec itself is wrong, as `validate` would say.
    """
    return examine_job(load_spec(spec) if spec is not None else None, ray, say=say)


def examine_job(spec: JobSpec | None, ray: str | None, *, say: Callable[[str], None]) -> list[Finding]:
    """The same for a spec that is read; in a session with that Ray it looks from there."""
    found: list[Finding] = []
    job = None
    if spec is not None:
        say("doctor: looking at input, output and model")
        job, found = spec_findings(spec)
    unreachable = unreachable_finding(ray)
    if unreachable is not None:
        return [*found, unreachable]
    say("doctor: looking at Ray and its nodes")
    try:
        with ray_session(ray, replica_cpus=job.demand.replica_cpus if job and job.demand else 0):
            found += _ray_findings(ray, job)
    except RunError as error:
        found.append(refusal("ray", error))
    return found


def report(findings: list[Finding]) -> dict[str, Any]:
    """The findings for programs."""
    return {"exit_code": exit_code(findings), "findings": [asdict(finding) for finding in findings]}


def _ray_findings(named: str | None, job: KnownJob | None) -> list[Finding]:
    """Inside a session: who may use it, what its nodes are, and whether the job's fleet finds room."""
    import ray

    nodes = name_nodes(read_nodes())
    joined = ray.get_runtime_context().gcs_address
    paths = (job.files.path, job.model_folder) if job else (None, None)
    answers = ask_nodes(nodes, model_path=paths[0], model_folder=paths[1])
    driver = read_node_facts(*paths)
    mode = next((facts.auth_mode for facts in answers.facts.values()), driver.auth_mode)
    pools, about_fleet = _fleet_findings(job, list(nodes.values()))
    return [
        address_finding(named, joined=joined, nodes=list(nodes.values())),
        *auth_findings(named, joined=joined, mode=mode, token_file_mode=driver.token_file_mode),
        *silence_findings(answers),
        *node_findings(driver, answers.facts, _needs(job, pools), hosts=_hosts(pools, nodes)),
        *gpu_findings(list(nodes.values()), job.spec.fleet.gpu_types if job else ()),
        *warm_fleet_findings(),
        *about_fleet,
    ]


def _fleet_findings(job: KnownJob | None, nodes: Sequence[Node]) -> tuple[list[PoolPlan], list[Finding]]:
    """The pools that a run would start, and all that is to say of them."""
    if job is None:
        return [], []
    if job.demand is None:
        return [], [attach_finding(job)]
    pools, found = pool_findings(job.demand, nodes, grows=can_grow())
    about_fit = fit_findings(job.planned, nodes, job.spec.fleet.gpu_types) if job.planned else []
    return pools, [*about_fit, *found]


def _needs(job: KnownJob | None, pools: Sequence[PoolPlan]) -> Needs | None:
    if job is None:
        return None
    return replace(job.needs, cpu_engines=sum(pool.num_replicas for pool in pools if not pool.shape.num_gpus))


def _hosts(pools: Sequence[PoolPlan], nodes: Mapping[str, Node]) -> set[str]:
    """Names of the nodes that may get a replica."""
    return {
        name
        for name, node in nodes.items()
        if any(node.suits(pool.shape) and fitting(node.total, pool.shape) for pool in pools)
    }
