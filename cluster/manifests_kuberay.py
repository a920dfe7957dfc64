"""Manifests for KubeRay 1.7: a cluster that stays, and a cluster for one job. Pure.

What Kubernetes itself would refuse (names, say) is refused here, where the message can say what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cluster.fleet_file import FleetFile
from cluster.manifest_notes import cluster_notes, cost_lines
from cluster.manifest_pods import CONTAINER_SECURITY, JOB_FOLDER, POD_SECURITY, head_pod, job_map_name, worker_pod
from cluster.node_groups import NodeGroup
from cluster.yaml_text import Commented
from pipeline.errors import SpecError

RAY_VERSION = "2.60.0"
"""As pinned in cluster/image/requirements-*.txt; head, workers and autoscaler must agree."""
# KubeRay clips names at 50 characters and adds to them; a CronJob's ticks add 11.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,33}[a-z0-9])?")
_IDLE_S = 300
_KEEP_AFTER_JOB_S = 60
BACKOFF = 2


def raycluster(file: FleetFile, groups: Sequence[NodeGroup]) -> list[Commented]:
    """A cluster that stays until it is deleted."""
    name = checked_name(file)
    namespace = file.cluster.namespace
    data = {**head_of("ray.io/v1", "RayCluster", name, namespace), "spec": cluster_spec(file, groups, with_job=False)}
    head = [
        f"RayCluster {name}: a Ray cluster that stays until you delete it, idle or not.",
        "Made by `tramontane manifest`; change the fleet file, not this. Needs KubeRay 1.7 and a GPU device plugin.",
        *cost_lines(file, groups),
        *token_lines(file),
        *use_lines(f"raycluster/{name}", namespace, file="raycluster.yaml"),
        "Nothing is reachable from outside the Kubernetes cluster. Dashboard:",
        f"  kubectl -n {namespace} port-forward service/{name}-head-svc 8265",
    ]
    return [Commented(data, head, cluster_notes(("spec",), groups))]


def rayjob(file: FleetFile, groups: Sequence[NodeGroup], job_text: str) -> list[Commented]:
    """A cluster for one job, gone when the job ends."""
    name = checked_name(file)
    namespace = file.cluster.namespace
    entrypoint = f"tramontane run {JOB_FOLDER}/job.yaml"
    data = {**head_of("ray.io/v1", "RayJob", name, namespace), "spec": job_spec(file, groups, entrypoint)}
    head = [
        f"RayJob {name}: starts a Ray cluster, runs the job in it, removes the cluster {_KEEP_AFTER_JOB_S} s later.",
        "Made by `tramontane manifest`; change the fleet file, not this. Needs KubeRay 1.7 and a GPU device plugin.",
        *cost_lines(file, groups),
        *token_lines(file),
        *use_lines(f"rayjob/{name}", namespace, file="rayjob.yaml"),
        "To run it again, delete it first; committed rows are not done again.",
    ]
    return [Commented(data, head, cluster_notes(_IN_JOB, groups) | _JOB_NOTES), job_map(file, {"job.yaml": job_text})]


def checked_name(file: FleetFile) -> str:
    """The fleet's name, if Kubernetes takes it.

    Raises:
        SpecError: it doesn't.
    """
    if not _NAME.fullmatch(file.name):
        raise SpecError(
            f"name {file.name!r} can't be a name in Kubernetes: use lower-case letters, digits and dashes, starting "
            "with a letter, at most 35"
        )
    return file.name


def head_of(version: str, kind: str, name: str, namespace: str) -> dict[str, Any]:
    """What every object begins with."""
    return {"apiVersion": version, "kind": kind, "metadata": _metadata(name, namespace)}


def _metadata(name: str, namespace: str) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "tramontane", "app.kubernetes.io/instance": name}
    return {"name": name, "namespace": namespace, "labels": labels}


def cluster_spec(file: FleetFile, groups: Sequence[NodeGroup], *, with_job: bool) -> dict[str, Any]:
    """Spec of a RayCluster; `with_job` mounts the job's config map."""
    spec: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": _token_secret(file)},
    }
    if any(group.is_scaled for group in groups):
        amounts = {"cpu": "500m", "memory": "1Gi"}
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": _IDLE_S,
            "securityContext": CONTAINER_SECURITY,
            "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        }
    spec["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "enableIngress": False,
        "rayStartParams": {"num-cpus": str(file.cluster.head.cpus), "num-gpus": "0"},
        "template": head_pod(file, with_job=with_job),
    }
    spec["workerGroupSpecs"] = [_worker_group(file, group) for group in groups]
    return spec


def _worker_group(file: FleetFile, group: NodeGroup) -> dict[str, Any]:
    return {
        "groupName": group.name,
        "replicas": group.min_nodes,
        "minReplicas": group.min_nodes,
        "maxReplicas": group.max_nodes,
        "labels": group.labels,
        "rayStartParams": {"num-cpus": str(group.ray_cpus), "num-gpus": str(group.num_gpus)},
        "template": worker_pod(file, group),
    }


def job_spec(file: FleetFile, groups: Sequence[NodeGroup], entrypoint: str) -> dict[str, Any]:
    """Spec of a RayJob that runs the command in a cluster of its own."""
    return {
        "entrypoint": entrypoint,
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _KEEP_AFTER_JOB_S,
        "backoffLimit": BACKOFF,
        "submitterPodTemplate": {"spec": small_pod("ray-job-submitter", file)},
        "rayClusterSpec": cluster_spec(file, groups, with_job=True),
    }


def small_pod(name: str, file: FleetFile) -> dict[str, Any]:
    """A pod that only waits for others."""
    container = {
        "name": name,
        "image": file.cluster.image,
        "securityContext": CONTAINER_SECURITY,
        "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": 1, "memory": "1Gi"}},
    }
    return {"restartPolicy": "Never", "securityContext": POD_SECURITY, "containers": [container]}


def job_map(file: FleetFile, files: dict[str, str]) -> Commented:
    """The config map that pods find at `JOB_FOLDER`."""
    name = job_map_name(file)
    data = {**head_of("v1", "ConfigMap", name, file.cluster.namespace), "data": files}
    return Commented(data, [f"ConfigMap {name}: the job's spec, as given. Costs nothing; deleted with the rest."])


def _token_secret(file: FleetFile) -> str:
    return file.cluster.auth_secret or f"{file.name}-ray-token"


def token_lines(file: FleetFile) -> list[str]:
    """What has to be there before: namespace, token, secrets."""
    secret = _token_secret(file)
    create = f"kubectl -n {file.cluster.namespace} create secret generic {secret}"
    others = sorted({f"{entry.secret} (key {entry.key})" for entry in file.cluster.secrets})
    return [
        f"Once, before: the namespace, if it isn't there (kubectl create namespace {file.cluster.namespace}), and the",
        "token without which nobody can talk to this Ray:",
        f"""  {create} --from-literal=auth_token="$(openssl rand -hex 32)\"""",
        *([f"and the secrets {', '.join(others)}."] if others else []),
    ]


def use_lines(thing: str, namespace: str, *, file: str) -> list[str]:
    """How to apply, watch and delete it."""
    return [
        "Apply, watch, delete (which ends all costs but those of volumes):",
        f"  kubectl apply -f {file}",
        f"  kubectl -n {namespace} get {thing} --watch",
        f"  kubectl delete -f {file}",
    ]


_IN_JOB = ("spec", "rayClusterSpec")
_JOB_NOTES = {
    ("spec", "shutdownAfterJobFinishes"): "The cluster goes with the job, whatever its exit code.",
    ("spec", "backoffLimit"): (
        "A lost head ends the driver. KubeRay then makes a new cluster and starts the same command, which goes on "
        "where the output says it stopped. Exit codes 1 and 2 are tried again too, and end the same way."
    ),
}
