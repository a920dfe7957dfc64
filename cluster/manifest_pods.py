"""Pods of a Ray cluster: the head without GPUs, and one kind of worker per group of nodes. Pure.

Guarantees, of every pod here:
- it runs as user 1000 without capabilities, can't gain privileges, and shares no network or processes with its node.
- secrets are named, never held.
- it is told to go before it is killed, and Ray drains its node meanwhile.
"""

from __future__ import annotations

from typing import Any

from cluster.fleet_file import ClusterSettings, FleetFile
from cluster.gpus import CPU
from cluster.node_groups import NodeGroup

USER_ID = 1000
"""`tramontane` in cluster/image/Dockerfile.*; pods name the number because Kubernetes can't look names up."""
MODELS_PATH = "/models"
JOB_FOLDER = "/etc/tramontane"
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
POD_SECURITY = {"runAsNonRoot": True, "runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID}
_HEAD_DRAIN_S = 30
_SHM_SHARE = 0.4
"""Of a pod's memory: Ray's object store takes 0.3 of it, and engines of several GPUs exchange tensors there."""
_GONE_BEFORE_KILL_S = 10
"""Between the end of draining and Kubernetes' SIGKILL."""
_SPOT_NODES: dict[str, tuple[dict[str, str], str | None]] = {
    # Labels of spot nodes, and the taint key where the platform sets one.
    "gke": ({"cloud.google.com/gke-spot": "true"}, "cloud.google.com/gke-spot"),
    "eks": ({"eks.amazonaws.com/capacityType": "SPOT"}, None),
    "aks": ({"kubernetes.azure.com/scalesetpriority": "spot"}, "kubernetes.azure.com/scalesetpriority"),
    "other": ({}, None),
}


def head_pod(file: FleetFile, *, with_job: bool) -> dict[str, Any]:
    """Pod template of the head; `with_job` mounts the job's config map."""
    head = file.cluster.head
    container = _container("ray-head", file.cluster.image or "", cpus=head.cpus, memory_gib=head.memory_gib)
    container["ports"] = [
        {"containerPort": 6379, "name": "gcs-server"},
        {"containerPort": 8265, "name": "dashboard"},
        {"containerPort": 10001, "name": "client"},
    ]
    container["env"] = environment(file.cluster, drain_s=_HEAD_DRAIN_S)
    volumes, mounts = _volumes(file.cluster, memory_gib=head.memory_gib)
    if with_job:
        volumes.append({"name": "job", "configMap": {"name": job_map_name(file)}})
        mounts.append({"name": "job", "mountPath": JOB_FOLDER, "readOnly": True})
    container["volumeMounts"] = mounts
    spec: dict[str, Any] = {
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": _HEAD_DRAIN_S + _GONE_BEFORE_KILL_S,
    }
    if file.cluster.service_account is not None:
        spec["serviceAccountName"] = file.cluster.service_account
    if head.machine is not None:
        spec["nodeSelector"] = {"node.kubernetes.io/instance-type": head.machine}
    return {"spec": {**spec, "containers": [container], "volumes": volumes}}


def worker_pod(file: FleetFile, group: NodeGroup) -> dict[str, Any]:
    """Pod template of one group."""
    container = _container("ray-worker", group.image, cpus=group.cpus, memory_gib=group.memory_gib)
    if group.gpu_resource is not None:
        for amounts in container["resources"].values():
            amounts[group.gpu_resource] = group.num_gpus
    container["env"] = environment(file.cluster, drain_s=group.drain_s)
    volumes, container["volumeMounts"] = _volumes(file.cluster, memory_gib=group.memory_gib)
    spec: dict[str, Any] = {
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": group.drain_s + _GONE_BEFORE_KILL_S,
        "automountServiceAccountToken": file.cluster.service_account is not None,
    }
    if file.cluster.service_account is not None:
        spec["serviceAccountName"] = file.cluster.service_account
    if selector := _node_selector(file.cluster, group):
        spec["nodeSelector"] = selector
    if tolerations := _tolerations(file.cluster, group):
        spec["tolerations"] = tolerations
    return {"spec": {**spec, "containers": [container], "volumes": volumes}}


def environment(cluster: ClusterSettings, *, drain_s: int) -> list[dict[str, Any]]:
    """Variables of a Ray container; the operator adds the token's from `authOptions`."""
    plain = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_s),
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HOME": f"{MODELS_PATH}/huggingface",
    }
    entries: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items()]
    for secret in cluster.secrets:
        reference = {"name": secret.secret, "key": secret.key}
        entries.append({"name": secret.env, "valueFrom": {"secretKeyRef": reference}})
    return entries


def job_map_name(file: FleetFile) -> str:
    """The config map that holds the job's spec."""
    return f"{file.name}-job"


def _container(name: str, image: str, *, cpus: int, memory_gib: int) -> dict[str, Any]:
    amounts = {"cpu": cpus, "memory": f"{memory_gib}Gi"}
    return {
        "name": name,
        "image": image,
        "securityContext": CONTAINER_SECURITY,
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
    }


def _volumes(cluster: ClusterSettings, *, memory_gib: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and where they are mounted."""
    cache = cluster.model_cache
    source: dict[str, Any] = {"emptyDir": {"sizeLimit": f"{cache.size_gib}Gi"}}
    if cache.claim is not None:
        source = {"persistentVolumeClaim": {"claimName": cache.claim}}
    shm_gib = max(1, int(memory_gib * _SHM_SHARE))
    volumes = [
        {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
        {"name": "models", **source},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "dshm", "mountPath": "/dev/shm"},  # noqa: S108
        {"name": "models", "mountPath": MODELS_PATH},
    ]
    for index, volume in enumerate(cluster.volumes):
        volumes.append({"name": f"rows-{index}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"rows-{index}", "mountPath": volume.path})
    return volumes, mounts


def _node_selector(cluster: ClusterSettings, group: NodeGroup) -> dict[str, str]:
    entry = group.settings
    machine = {"node.kubernetes.io/instance-type": entry.machine} if entry.machine is not None else {}
    spot = _SPOT_NODES[cluster.kubernetes][0] if entry.spot else {}
    return {**machine, **spot, **entry.node_selector}


def _tolerations(cluster: ClusterSettings, group: NodeGroup) -> list[dict[str, Any]]:
    entry = group.settings
    keys = [] if entry.gpu == CPU else [group.gpu_resource]
    if entry.spot:
        keys.append(_SPOT_NODES[cluster.kubernetes][1])
    taints = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys if key is not None]
    return [*taints, *entry.tolerations]
