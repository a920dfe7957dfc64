"""Which nodes a fleet file asks for, and what is refused because it can't work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.fleet_file import FleetFile
from cluster.manifests import Job, manifest
from cluster.node_groups import node_groups
from cluster.pools import GPU_TYPE_LABEL
from jobs.fleet_file_source import load_fleet_file
from jobs.manifest import read_job
from pipeline.errors import SpecError
from tests.cluster.fleet_files import H100, fleet

EXAMPLES = Path(__file__).parents[2] / "cluster" / "examples"


@pytest.mark.parametrize(
    ("platform", "selector", "taint"),
    [
        ("gke", "cloud.google.com/gke-spot", "cloud.google.com/gke-spot"),
        ("eks", "eks.amazonaws.com/capacityType", None),
        ("aks", "kubernetes.azure.com/scalesetpriority", "kubernetes.azure.com/scalesetpriority"),
    ],
)
def test_spot_groups_ask_for_spot_nodes(platform: str, selector: str, taint: str | None) -> None:
    file = fleet([H100], [{"gpu": "H100-80G", "spot": True}], kubernetes=platform)
    [document] = yaml.safe_load_all(manifest(file, "raycluster"))
    [group] = document["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert selector in pod["nodeSelector"]
    assert {entry["key"] for entry in pod["tolerations"]} == {"nvidia.com/gpu", *([taint] if taint else [])}
    assert group["labels"]["ray.io/market-type"] == "spot"


def test_cluster_that_never_changes_has_no_autoscaler() -> None:
    fixed = fleet([H100], [{"gpu": "H100-80G", "gpus_per_node": 4}])
    [document] = yaml.safe_load_all(manifest(fixed, "raycluster"))
    assert "enableInTreeAutoscaling" not in document["spec"]
    growing = fleet([{**H100, "replicas": {"min": 0, "max": 4}}], [{"gpu": "H100-80G"}])
    [document] = yaml.safe_load_all(manifest(growing, "raycluster"))
    assert document["spec"]["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize(
    ("replicas", "tensor_parallel", "gpus_per_node", "expected"),
    [
        (1, 1, 8, (1, 1)),
        (8, 1, 8, (1, 1)),
        (9, 1, 8, (2, 2)),
        (5, 2, 8, (2, 2)),  # 4 replicas a node
        (2, 3, 8, (1, 1)),  # 2 replicas a node, 2 GPUs left over
        (3, 3, 8, (2, 2)),
        ({"min": 0, "max": 9}, 1, 8, (0, 2)),
        ({"min": 1, "max": 3}, 8, 8, (1, 3)),
        (1, 16, 8, (2, 2)),  # a replica over two nodes
        (3, 16, 8, (6, 6)),
        (3, 6, 4, (6, 6)),  # three GPUs of each, and one left over
        (2, 16, 6, (8, 8)),  # four of each
        ({"min": 0, "max": 2}, 16, 8, (0, 4)),
    ],
)
def test_nodes_are_worked_out_from_replicas(
    replicas: Any, tensor_parallel: int, gpus_per_node: int, expected: tuple[int, int]
) -> None:
    pool = {"gpu": "H200", "tensor_parallel": tensor_parallel, "replicas": replicas}
    [group] = node_groups(fleet([pool], [{"gpu": "H200", "gpus_per_node": gpus_per_node}]))
    assert (group.min_nodes, group.max_nodes) == expected


def test_a_manifest_says_that_replicas_span_nodes_and_what_it_does_not_ask_for() -> None:
    text = manifest(fleet([{**H100, "tensor_parallel": 16}], [GROUP]), "raycluster")
    assert "A replica spans 2 of them" in text
    assert "RDMA" in text
    assert "RDMA" not in manifest(fleet([H100], [GROUP]), "raycluster")


def test_amd_gpus_are_asked_for_by_their_own_name() -> None:
    pool = {"gpu": "MI300X", "replicas": 1}
    file = fleet([pool], [{"gpu": "MI300X", "image": "example.com/rocm:1"}])
    [document] = yaml.safe_load_all(manifest(file, "raycluster"))
    [container] = document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["amd.com/gpu"] == 8
    assert container["image"] == "example.com/rocm:1"


def test_cpu_pools_get_nodes_without_gpus() -> None:
    file = fleet([{"gpu": "cpu", "replicas": 4, "tensor_parallel": 2}], [{"gpu": "cpu", "cpus": 4}])
    [document] = yaml.safe_load_all(manifest(file, "raycluster"))
    [group] = document["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] == 2
    assert GPU_TYPE_LABEL not in group["labels"]
    assert not [key for key in group["template"]["spec"]["containers"][0]["resources"]["limits"] if "gpu" in key]


def test_prices_are_summed_only_when_all_are_given() -> None:
    group = {"gpu": "H100-80G", "gpus_per_node": 4, "max_nodes": 3, "usd_per_node_hour": 20}
    assert "no sum" in manifest(fleet([H100], [group]), "raycluster")
    priced = fleet([H100], [group], head={"usd_per_node_hour": 0.5})
    assert "$20.50 to $60.50 an hour" in manifest(priced, "raycluster")


# Refusals

GROUP = {"gpu": "H100-80G"}
REFUSALS: list[tuple[str, FleetFile, str]] = [
    (
        "raycluster",
        fleet([H100, {"gpu": "L4"}], [GROUP]),
        r"pools\[1\] asks for gpu L4, but cluster.groups has H100-80G",
    ),
    (
        "raycluster",
        fleet([{**H100, "tensor_parallel": 16}], [{**GROUP, "max_nodes": 1}]),
        r"tensor_parallel=16 is more than the 8 GPUs.*evenly takes 2 nodes, but max_nodes is 1",
    ),
    ("raycluster", fleet([{"gpu": "cpu", "tensor_parallel": 9}], [{"gpu": "cpu"}]), r"more than the 8 CPUs"),
    ("raycluster", fleet([H100], [GROUP, GROUP]), "second group of H100-80G"),
    ("raycluster", fleet([H100], [GROUP, {"gpu": "L4"}]), "no pool uses L4"),
    ("raycluster", fleet([{**H100, "replicas": "max"}], [GROUP]), "give the group max_nodes"),
    ("raycluster", fleet([{**H100, "replicas": 9}], [{**GROUP, "max_nodes": 2}]), "take 3 nodes, but max_nodes is 2"),
    ("raycluster", fleet([H100], [{**GROUP, "min_nodes": 3, "max_nodes": 2}]), "min_nodes 3, more than its 2"),
    ("raycluster", fleet([{"gpu": "H100"}], [{"gpu": "H100"}]), "gpu 'H100' is no GPU type known here. did you mean"),
    ("raycluster", fleet([{"gpu": "MI300X"}], [{"gpu": "MI300X"}]), "ROCm"),
    ("raycluster", fleet([H100], [GROUP], image=None), "cluster.image is missing"),
    ("raycluster", fleet([H100], [GROUP]).model_copy(update={"name": "My.Fleet"}), "lower-case letters"),
    ("raycluster", fleet([H100], [GROUP]).model_copy(update={"name": "n" * 36}), "at most 35"),
    ("ray-up-aws", fleet([H100], [GROUP]), "cluster.aws.ami is missing"),
    ("ray-up-aws", fleet([H100], [GROUP], aws={"ami": "a"}), "cluster.head.machine is missing"),
    ("ray-up-aws", fleet([H100], [GROUP], aws={"ami": "a"}, head={"machine": "m"}), r"groups\[H100-80G\].machine"),
    ("ray-up-gcp", fleet([H100], [GROUP]), "cluster.gcp.project is missing"),
    ("ray-up-local", fleet([H100], [GROUP]), "cluster.on_premises.head is missing"),
    ("ray-up-local", fleet([H100], [GROUP], on_premises={"head": "h"}), "has no hosts"),
    ("ray-up-local", fleet([H100], [{**GROUP, "hosts": ["a", "a"]}], on_premises={"head": "h"}), "host a stands twice"),
    ("ray-up-local", fleet([H100], [{**GROUP, "hosts": ["a"], "spot": True}], on_premises={"head": "h"}), "spot: true"),
    ("swarm", fleet([H100], [GROUP]), "--target 'swarm' is unknown; use one of raycluster"),
    ("rayjob", fleet([H100], [GROUP]), "add --job job.yaml"),
]


@pytest.mark.parametrize(("target", "file", "message"), REFUSALS, ids=[message for _, _, message in REFUSALS])
def test_what_cannot_work_is_refused_with_its_cure(target: str, file: FleetFile, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        manifest(file, target)


def example_job(**sections: Any) -> Job:
    job = read_job(EXAMPLES / "job.yaml")
    return replace(
        job,
        text="x",
        fleet=job.fleet.model_copy(update=sections.get("fleet", {})),
        input_paths=sections.get("input_paths", job.input_paths),
        output_path=sections.get("output_path", job.output_path),
    )


@pytest.mark.parametrize(
    ("target", "job", "message"),
    [
        ("raycluster", example_job(), "runs no job by itself"),
        ("rayjob", example_job(fleet={"attach": "warm"}), "attaches to the warm fleet warm"),
        ("rayjob", example_job(output_path="out/labels"), "output.path out/labels is on this machine"),
        ("rayjob", example_job(input_paths=["s3://b/a.parquet", "/data/b.parquet"]), "input.path /data/b.parquet"),
        ("rayjob", replace(example_job(), text="x" * 900_001), "no larger config map"),
    ],
)
def test_jobs_that_cannot_run_there_are_refused(target: str, job: Job, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        manifest(load_fleet_file(EXAMPLES / "fleet.yaml"), target, job)


def test_job_whose_pools_the_groups_cannot_hold_is_refused() -> None:
    file = fleet([H100], [GROUP])
    with pytest.raises(SpecError, match=r"--job: fleet.pools\[1\] asks for gpu L40S"):
        manifest(file, "rayjob", example_job())


def test_rows_on_a_mounted_volume_are_fine() -> None:
    file = load_fleet_file(EXAMPLES / "fleet.yaml")
    volumes = FleetFile.model_validate(
        {**file.model_dump(), "cluster": {**file.cluster.model_dump(), "volumes": [{"claim": "rows", "path": "/rows"}]}}
    )
    text = manifest(volumes, "rayjob", example_job(input_paths=["/rows/in"], output_path="/rows/out"))
    assert "mountPath: /rows" in text
    with pytest.raises(SpecError, match="/rowsout"):
        manifest(volumes, "rayjob", example_job(output_path="/rowsout"))
