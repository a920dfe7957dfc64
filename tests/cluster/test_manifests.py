"""Manifests: valid to KubeRay and to Ray, closed to strangers, able to hold the pools, or refused with a cure."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import manifests
from cluster.manifest_pods import USER_ID
from cluster.manifests_kuberay import RAY_VERSION
from cluster.pools import GPU_TYPE_LABEL, slot_shape
from jobs.fleet_file_source import load_fleet_file
from jobs.manifest import write_manifest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "cluster" / "examples"
SCHEMAS = ROOT.parent / "shared" / "kuberay"
IMAGE = ROOT / "cluster" / "image"
FLEETS = {"ray-up-gcp": "fleet-gcp.yaml", "ray-up-local": "fleet-on-premises.yaml"}
CHECKED_IN = {
    "raycluster": "kuberay/raycluster.yaml",
    "rayservice": "kuberay/rayservice.yaml",
    "rayjob": "kuberay/rayjob.yaml",
    "cronjob": "kuberay/cronjob.yaml",
    "ray-up-aws": "launcher/aws.yaml",
    "ray-up-gcp": "launcher/gcp.yaml",
    "ray-up-local": "launcher/on-premises.yaml",
}
TARGETS = [target for target in manifests.TARGETS if target != "raycronjob"]
"""That one is `tramontane schedule`'s: tests/jobs/test_schedule.py."""
KUBERNETES = [target for target in TARGETS if not target.startswith("ray-up")]
LAUNCHER = [target for target in TARGETS if target.startswith("ray-up")]


def example_text(target: str) -> str:
    job = EXAMPLES / "job.yaml" if target in ("rayjob", "cronjob") else None
    return write_manifest(EXAMPLES / FLEETS.get(target, "fleet.yaml"), target=target, job=job, output=None)


def documents(target: str) -> list[dict[str, Any]]:
    """All documents of a target's example, with the one inside the cron job's config map."""
    found = list(yaml.safe_load_all(example_text(target)))
    inner = [yaml.safe_load(doc["data"]["rayjob.yaml"]) for doc in found if "rayjob.yaml" in doc.get("data", {})]
    return [*found, *inner]


def of_kind(target: str, kind: str) -> dict[str, Any]:
    [found] = [document for document in documents(target) if document["kind"] == kind]
    return found


def cluster_spec(target: str) -> dict[str, Any]:
    if target == "raycluster":
        return dict(of_kind(target, "RayCluster")["spec"])
    if target == "rayservice":
        return dict(of_kind(target, "RayService")["spec"]["rayClusterConfig"])
    return dict(of_kind(target, "RayJob")["spec"]["rayClusterSpec"])


def pod_specs(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod spec anywhere in a document."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pod_specs(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_specs(value)


def all_values(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from all_values(value)
    else:
        yield node


@pytest.mark.parametrize("target", TARGETS)
def test_checked_in_examples_are_what_the_command_writes(target: str) -> None:
    assert (ROOT / "cluster" / CHECKED_IN[target]).read_text() == example_text(target)


def test_every_checked_in_example_is_tested() -> None:
    there = {
        f"{path.parent.name}/{path.name}"
        for folder in ("kuberay", "launcher")
        for path in (ROOT / "cluster" / folder).glob("*")
    }
    assert there == set(CHECKED_IN.values())


# KubeRay's own schemas


@pytest.fixture(scope="module")
def crd() -> Any:
    if not SCHEMAS.is_dir():
        pytest.skip(f"KubeRay's CRD schemas are not in {SCHEMAS}; put rayclusters.yaml and rayjobs.yaml there")
    loaded: dict[str, Any] = {}

    def schema(name: str) -> Any:
        """Spec schema of `rayclusters` or `rayjobs`, v1, unknown fields refused as `kubectl --validate` does."""
        if name not in loaded:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            versions = yaml.load((SCHEMAS / f"{name}.yaml").read_text(), Loader=loader)["spec"]["versions"]
            [v1] = [version for version in versions if version["name"] == "v1"]
            loaded[name] = v1["schema"]["openAPIV3Schema"]
            close(loaded[name])
        return loaded[name]

    return schema


def close(schema: Any) -> None:
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            close(value)
    elif isinstance(schema, list):
        for value in schema:
            close(value)


def test_raycluster_is_valid_to_kuberay(crd: Any) -> None:
    schema = crd("rayclusters")
    schema["properties"]["metadata"].pop("additionalProperties", None)
    jsonschema.validate(of_kind("raycluster", "RayCluster"), schema)


def test_rayservice_is_valid_to_kuberay(crd: Any) -> None:
    jsonschema.validate(of_kind("rayservice", "RayService"), crd("rayservices"))


@pytest.mark.parametrize("target", ["rayjob", "cronjob"])
def test_rayjob_is_valid_to_kuberay(target: str, crd: Any) -> None:
    schema = crd("rayjobs")
    jsonschema.validate(of_kind(target, "RayJob"), schema)


def test_pod_of_the_cron_job_is_valid_to_kubernetes(crd: Any) -> None:
    schema = crd("rayjobs")["properties"]["spec"]["properties"]["submitterPodTemplate"]
    jsonschema.validate(of_kind("cronjob", "CronJob")["spec"]["jobTemplate"]["spec"]["template"], schema)


def test_the_schemas_refuse_what_they_do_not_know(crd: Any) -> None:
    wrong = of_kind("raycluster", "RayCluster")
    wrong["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imagee"):
        jsonschema.validate(wrong["spec"], crd("rayclusters")["properties"]["spec"])


# Ray's own schema


@pytest.mark.parametrize("target", LAUNCHER)
def test_ray_up_file_is_valid_to_ray(target: str) -> None:
    [document] = documents(target)
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations
    schema = json.loads(
        (Path(next(iter(spec.submodule_search_locations))) / "autoscaler" / "ray-schema.json").read_text()
    )
    jsonschema.validate(document, schema)


@pytest.mark.parametrize("target", LAUNCHER)
def test_ray_prepares_and_accepts_ray_up_file(target: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    [document] = documents(target)
    prepared = prepare_config(document)
    validate_config(prepared)
    if target == "ray-up-local":
        assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 3


# Security


@pytest.mark.parametrize("target", KUBERNETES)
def test_every_pod_is_confined(target: str) -> None:
    pods = [pod for document in documents(target) for pod in pod_specs(document)]
    assert len(pods) >= 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == USER_ID
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert not security.get("privileged")


@pytest.mark.parametrize("target", KUBERNETES)
def test_token_is_asked_for_and_comes_from_a_secret(target: str) -> None:
    assert cluster_spec(target)["authOptions"] == {"mode": "token", "secretName": "mixtral-ray-token"}


@pytest.mark.parametrize("target", LAUNCHER)
def test_token_is_asked_for_and_comes_from_a_file(target: str) -> None:
    [document] = documents(target)
    options = document["docker"]["run_options"]
    [path] = [option.partition("=")[2] for option in options if option.startswith("--env RAY_AUTH_TOKEN_PATH=")]
    assert "--env RAY_AUTH_MODE=token" in options
    assert document["file_mounts"][path] == "~/.ray/auth_token"
    assert "--user 1000:1000" in options
    assert "--cap-drop ALL" in options


@pytest.mark.parametrize("target", TARGETS)
def test_no_secret_is_in_the_text(target: str) -> None:
    for document in documents(target):
        assert document.get("kind") != "Secret"
        for pod in pod_specs(document):
            for entry in [entry for container in pod["containers"] for entry in container.get("env", [])]:
                if re.search("TOKEN|SECRET|KEY|PASSWORD", entry["name"]):
                    assert "secretKeyRef" in entry["valueFrom"], entry
    assert not re.search(r"(?i)RAY_AUTH_TOKEN=|password[=:]", example_text(target))


@pytest.mark.parametrize("target", TARGETS)
def test_no_dashboard_is_exposed(target: str) -> None:
    if target in LAUNCHER:
        [document] = documents(target)
        [head] = [line for line in document["head_start_ray_commands"] if "--head" in line]
        assert "--dashboard-host=127.0.0.1" in head
    else:
        head_group = cluster_spec(target)["headGroupSpec"]
        assert head_group["serviceType"] == "ClusterIP"
        assert head_group["enableIngress"] is False
        assert not [document for document in documents(target) if document["kind"] in ("Ingress", "Service")]


# Pools and nodes


@pytest.mark.parametrize("target", KUBERNETES)
def test_worker_groups_carry_what_pools_ask_for(target: str) -> None:
    pools = {pool.gpu: pool for pool in load_fleet_file(EXAMPLES / "fleet.yaml").fleet.pools}
    groups = cluster_spec(target)["workerGroupSpecs"]
    assert {group["labels"][GPU_TYPE_LABEL] for group in groups} == set(pools)
    for group in groups:
        shape = slot_shape(pools[group["labels"][GPU_TYPE_LABEL]])
        assert group["labels"][GPU_TYPE_LABEL] in shape.gpu_labels
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == int(group["rayStartParams"]["num-gpus"]) >= shape.num_gpus
        assert int(group["rayStartParams"]["num-cpus"]) >= shape.num_cpus
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("target", ["ray-up-aws", "ray-up-gcp"])
def test_node_types_carry_what_pools_ask_for(target: str) -> None:
    [document] = documents(target)
    pools = load_fleet_file(EXAMPLES / FLEETS.get(target, "fleet.yaml")).fleet.pools
    labels = [kind["labels"][GPU_TYPE_LABEL] for kind in document["available_node_types"].values() if "labels" in kind]
    assert labels == [pool.gpu for pool in pools]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("10.0.0.11", "--labels=ray.io/accelerator-type=H100-80G,ray.io/market-type=on-demand --num-cpus=8"),
        ("10.0.0.21", "--labels=ray.io/accelerator-type=A100-80G,ray.io/market-type=on-demand --num-cpus=4"),
    ],
)
def test_machines_of_ones_own_label_themselves(host: str, expected: str) -> None:
    [document] = documents("ray-up-local")
    script = f"hostname() {{ echo '192.168.1.5 {host} 172.17.0.1'; }}; ray() {{ echo ray \"$@\"; }}; "
    shown = subprocess.run(
        ["bash", "-c", script + document["worker_start_ray_commands"][-1]], check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip().endswith(expected)


@pytest.mark.parametrize("target", KUBERNETES)
def test_head_has_no_gpu_and_is_no_spot_node(target: str) -> None:
    head = cluster_spec(target)["headGroupSpec"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    pod = head["template"]["spec"]
    assert not [key for key in pod["containers"][0]["resources"]["limits"] if "gpu" in key]
    assert "tolerations" not in pod
    assert not [key for key in pod.get("nodeSelector", {}) if "spot" in key.lower() or "capacity" in key.lower()]


@pytest.mark.parametrize("target", KUBERNETES)
def test_pods_are_told_before_they_are_killed_and_drain_meanwhile(target: str) -> None:
    spec = cluster_spec(target)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        drain_s = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 0 < drain_s < pod["terminationGracePeriodSeconds"]


# Comments


@pytest.mark.parametrize("target", TARGETS)
def test_first_lines_say_what_it_makes_costs_and_how_to_delete_it(target: str) -> None:
    head = "\n".join(
        line for line in example_text(target).split("\napiVersion")[0].splitlines() if line.startswith("#")
    )
    assert "Costs while" in head
    assert "GPUs" in head
    assert "kubectl delete -f" in head if target in KUBERNETES else "ray down" in head


@pytest.mark.parametrize("target", KUBERNETES)
def test_every_document_says_what_it_is(target: str) -> None:
    for text in example_text(target).split("\n---\n"):
        assert text.startswith("# ")


# Jobs


def test_job_is_in_the_cluster_as_it_was_written() -> None:
    text = (EXAMPLES / "job.yaml").read_text()
    assert of_kind("rayjob", "ConfigMap")["data"]["job.yaml"] == text
    job = of_kind("rayjob", "RayJob")
    [head] = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    [mount] = [mount for mount in head["volumeMounts"] if mount["name"] == "job"]
    assert job["spec"]["entrypoint"] == f"tramontane run {mount['mountPath']}/job.yaml"
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def test_cron_job_never_overlaps_and_each_tick_has_its_output() -> None:
    spec = of_kind("cronjob", "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert "output.path='s3://example-bucket/labels/{tick}'" in of_kind("cronjob", "RayJob")["spec"]["entrypoint"]
    rules = of_kind("cronjob", "Role")["rules"]
    assert rules == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]


# Images


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_image_suits_the_manifests(kind: str) -> None:
    lines = (IMAGE / f"Dockerfile.{kind}").read_text()
    code = "\n".join(line for line in lines.splitlines() if not line.startswith("#"))
    assert "ENTRYPOINT" not in code  # `ray up` runs `docker run IMAGE bash`
    assert re.search(r"^USER 1000:1000$", code, re.MULTILINE)
    assert f"--uid {USER_ID}" in code
    for tool in ("wget", "rsync", "hostname"):
        assert re.search(rf"apt-get install .*\b{tool}\b", code)
    assert f"ray=={RAY_VERSION}" in (IMAGE / f"requirements-{kind}.txt").read_text().splitlines()
