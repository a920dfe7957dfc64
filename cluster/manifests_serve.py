"""Manifest for KubeRay 1.7: a cluster with a warm fleet and an endpoint in front of it. Pure.

Other pods can reach it, so it always needs API keys: their hashes come from a Kubernetes secret, which pods see change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster.fleet_file import FleetFile
from cluster.manifest_notes import cluster_notes, cost_lines
from cluster.manifests_kuberay import checked_name, cluster_spec, head_of, token_lines, use_lines
from cluster.node_groups import NodeGroup
from cluster.serve_settings import ServeSettings
from cluster.yaml_text import Commented, yaml_text
from pipeline.errors import SpecError

KEYS_FOLDER = "/etc/tramontane/api-keys"
KEYS_ENTRY = "keys"
BUILDER = "jobs.serve_service:application_of"
"""What Serve imports; `jobs` is part of the image."""
_IN_SERVICE = ("spec", "rayClusterConfig")


def rayservice(file: FleetFile, groups: Sequence[NodeGroup]) -> list[Commented]:
    """A cluster that stays, with an endpoint on port `serve.port` of the service `NAME-serve-svc`.

    Raises:
        SpecError: batches would be gone with the head's pod.
    """
    name = checked_name(file)
    _check_batches(file)
    namespace = file.cluster.namespace
    cluster = cluster_spec(file, groups, with_job=False)
    _mount_keys(cluster["headGroupSpec"]["template"]["spec"], name, file.serve)
    data = {
        **head_of("ray.io/v1", "RayService", name, namespace),
        "spec": {"serveConfigV2": _serve_config(file), "rayClusterConfig": cluster},
    }
    head = [
        f"RayService {name}: a Ray cluster with a warm fleet and an OpenAI-compatible endpoint, until you delete it.",
        "Made by `tramontane manifest`; change the fleet file, not this. Needs KubeRay 1.7 and a GPU device plugin.",
        *cost_lines(file, groups),
        *token_lines(file),
        "and the hashes of the API keys, made with `tramontane key NAME --keys keys.txt`:",
        f"  kubectl -n {namespace} create secret generic {_secret(name)} --from-file={KEYS_ENTRY}=keys.txt",
        *use_lines(f"rayservice/{name}", namespace, file="rayservice.yaml"),
        "Nothing is reachable from outside the Kubernetes cluster. The endpoint:",
        f"  kubectl -n {namespace} port-forward service/{name}-serve-svc {file.serve.port}",
    ]
    return [Commented(data, head, cluster_notes(_IN_SERVICE, groups))]


def _check_batches(file: FleetFile) -> None:
    path = file.serve.batches
    folders = [volume.path.rstrip("/") + "/" for volume in file.cluster.volumes]
    if path is not None and not f"{path}/".startswith(tuple(folders)):
        raise SpecError(
            f"serve.batches {path} lies in no volume of the pods, so files and batches would be gone with the head's "
            "pod; add a volume to cluster.volumes, and choose a folder below its path"
        )


def _secret(name: str) -> str:
    return f"{name}-api-keys"


def _mount_keys(pod: dict[str, Any], name: str, serve: ServeSettings) -> None:
    [container] = pod["containers"]
    container["ports"].append({"containerPort": serve.port, "name": "serve"})
    pod["volumes"].append({"name": "api-keys", "secret": {"secretName": _secret(name), "defaultMode": 0o440}})
    container["volumeMounts"].append({"name": "api-keys", "mountPath": KEYS_FOLDER, "readOnly": True})


def _serve_config(file: FleetFile) -> str:
    """What KubeRay hands to Serve: where it listens, and what application to build from which fleet file."""
    serve = {**file.serve.model_dump(), "host": "0.0.0.0", "keys": f"{KEYS_FOLDER}/{KEYS_ENTRY}"}  # noqa: S104  a pod's
    given = file.model_dump(mode="json", exclude={"cluster", "serve"}, exclude_unset=True)
    config = {
        "proxy_location": "EveryNode",  # KubeRay asks each pod's proxy whether the pod is ready
        "http_options": {"host": serve["host"], "port": serve["port"], "keep_alive_timeout_s": 30},
        "applications": [
            {
                "name": "tramontane",
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": {"fleet_file": json.loads(json.dumps({**given, "serve": serve}))},
            }
        ],
    }
    return yaml_text([Commented(config, [])]).strip() + "\n"
