"""A fleet file and a target to a manifest's text. Pure; the targets' own modules know what goes into each.

What `tramontane manifest` prints. The examples in cluster/kuberay/ and cluster/launcher/ are its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cluster.fleet_file import FleetFile
from cluster.manifests_kuberay import raycluster, rayjob
from cluster.manifests_launcher import ray_up_aws, ray_up_gcp, ray_up_local
from cluster.manifests_scheduled import cronjob, raycronjob
from cluster.manifests_serve import rayservice
from cluster.node_groups import NodeGroup, node_groups, refuse_what_does_not_fit
from cluster.settings import FleetSettings
from cluster.yaml_text import Commented, yaml_text
from pipeline.errors import SpecError

Target = Literal[
    "raycluster", "rayservice", "rayjob", "cronjob", "raycronjob", "ray-up-aws", "ray-up-gcp", "ray-up-local"
]
TARGETS: tuple[Target, ...] = get_args(Target)
_WITH_JOB = ("rayjob", "cronjob", "raycronjob")
_WITHOUT_JOB: dict[str, Callable[[FleetFile, Sequence[NodeGroup]], list[Commented]]] = {
    "raycluster": raycluster,
    "rayservice": rayservice,
    "ray-up-aws": ray_up_aws,
    "ray-up-gcp": ray_up_gcp,
    "ray-up-local": ray_up_local,
}
_MAP_BYTES = 900_000
"""Kubernetes takes 1 MiB for a config map, the rest of it included."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job for a target that runs one."""

    text: str
    """Its spec's file, as it is."""
    fleet: FleetSettings
    input_paths: Sequence[str]
    output_path: str
    does_what_is_new: bool = False
    """Whether it keeps a folder for each of its runs below `output_path` by itself."""


def manifest(file: FleetFile, target: str, job: Job | None = None) -> str:
    """Text of a target's manifest.

    Raises:
        SpecError: no such target, a job is missing or too much, or the file can't be made into this.
    """
    if target not in TARGETS:
        raise SpecError(f"--target {target!r} is unknown; use one of {', '.join(TARGETS)}")
    groups = node_groups(file)
    if target not in _WITH_JOB:
        if job is not None:
            raise SpecError(f"--job is for {' and '.join(_WITH_JOB)}; {target} runs no job by itself: leave it out")
        return yaml_text(_WITHOUT_JOB[target](file, groups))
    if job is None:
        raise SpecError(f"--target {target} runs a job, and none is given; add --job job.yaml")
    _check_job(job, file, groups)
    if target == "rayjob":
        return yaml_text(rayjob(file, groups, job.text))
    output = None if job.does_what_is_new else job.output_path
    by_the_clock = raycronjob if target == "raycronjob" else cronjob
    return yaml_text(by_the_clock(file, groups, job.text, output))


def _check_job(job: Job, file: FleetFile, groups: Sequence[NodeGroup]) -> None:
    if job.fleet.attach is not None:
        raise SpecError(
            f"--job attaches to the warm fleet {job.fleet.attach}, but this target makes a cluster of its own; "
            "give the job pools instead of fleet.attach"
        )
    refuse_what_does_not_fit(job.fleet.pools, groups, where="--job: fleet.pools")
    if len(job.text.encode()) > _MAP_BYTES:
        raise SpecError(
            f"--job is larger than {math.floor(_MAP_BYTES / 1000)} kB; Kubernetes takes no larger config map"
        )
    for field, path in [*[("input.path", path) for path in job.input_paths], ("output.path", job.output_path)]:
        _check_path(field, path, file)


def _check_path(field: str, path: str, file: FleetFile) -> None:
    mounted = [volume.path.rstrip("/") for volume in file.cluster.volumes]
    if "://" in path or any(path == place or path.startswith(f"{place}/") for place in mounted):
        return
    raise SpecError(
        f"--job: {field} {path} is on this machine, and pods have other disks; use s3://, gs:// or abfs://, or a path "
        f"within a volume of cluster.volumes{': ' + ', '.join(mounted) if mounted else ''}"
    )
