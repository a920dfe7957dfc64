"""Files for `ray up`: AWS, Google Cloud, and machines of one's own. Pure.

Guarantees:
- no secret is in a file: the token is copied from the home of whoever runs `ray up`, cloud rights come from roles.
- the dashboard listens on the head itself only.
- nodes carry the GPU type as a label, so pools find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.fleet_file import FleetFile
from cluster.manifest_notes import cost_lines
from cluster.manifest_pods import MODELS_PATH
from cluster.node_groups import NodeGroup
from cluster.yaml_text import Commented
from pipeline.errors import SpecError

HOME = "/home/tramontane"
TOKEN_FILE = f"{HOME}/.ray/auth_token"
_HF_TOKEN_FILE = f"{HOME}/.cache/huggingface/token"
_HEAD = "head"
_OS_DISK_GIB = 100
_AWS_NETWORK = (
    "Ray makes a security group that lets these nodes talk to each other and admits SSH from anywhere; to narrow that, "
    "name one of your own under `security_group`."
)


def ray_up_aws(file: FleetFile, groups: Sequence[NodeGroup]) -> list[Commented]:
    """EC2 instances.

    Raises:
        SpecError: a machine type or the machine image is missing.
    """
    aws = file.cluster.aws
    ami = _given(
        aws.ami, "cluster.aws.ami", "find one in the EC2 console, `Deep Learning Base OSS Nvidia Driver GPU AMI`"
    )
    types: dict[str, Any] = {_HEAD: _head_type(file, _aws_node(file, ami, _head_machine(file), spot=False))}
    for group in groups:
        types[group.name] = _worker_type(group, _aws_node(file, ami, _machine(group), spot=group.settings.spot))
    provider = {"type": "aws", "region": aws.region, "availability_zone": aws.zones, "cache_stopped_nodes": False}
    data = {
        **_common(file, groups),
        "provider": {key: value for key, value in provider.items() if value is not None},
        "auth": {"ssh_user": "ubuntu"},
        "available_node_types": types,
        "head_node_type": _HEAD,
        "head_setup_commands": ["python -m pip install --user --quiet boto3"],
        **_start_commands(worker_after=_watch("aws"), autoscales=True),
    }
    head = _head_lines(file, groups, "aws.yaml", "EC2 instances, a security group, a key pair and a role for the head")
    return [Commented(data, head, _notes(groups) | {("provider",): _AWS_NETWORK})]


def ray_up_gcp(file: FleetFile, groups: Sequence[NodeGroup]) -> list[Commented]:
    """Compute Engine instances.

    Raises:
        SpecError: a machine type, the project or the disk image is missing.
    """
    gcp = file.cluster.gcp
    project = _given(gcp.project, "cluster.gcp.project", "name the project that pays")
    image = _given(
        gcp.source_image, "cluster.gcp.source_image", "choose one of the project deeplearning-platform-release"
    )
    types: dict[str, Any] = {_HEAD: _head_type(file, _gcp_node(file, image, _head_machine(file), group=None))}
    for group in groups:
        types[group.name] = _worker_type(group, _gcp_node(file, image, _machine(group), group=group))
    data = {
        **_common(file, groups),
        "provider": {"type": "gcp", "region": gcp.region, "availability_zone": gcp.zone, "project_id": project},
        "auth": {"ssh_user": "ubuntu"},
        "available_node_types": types,
        "head_node_type": _HEAD,
        "head_setup_commands": ["python -m pip install --user --quiet google-api-python-client cryptography"],
        **_start_commands(worker_after=_watch("gcp"), autoscales=True),
    }
    head = _head_lines(
        file, groups, "gcp.yaml", "Compute Engine instances, a key pair and a service account for the head"
    )
    return [Commented(data, head, _notes(groups))]


def ray_up_local(file: FleetFile, groups: Sequence[NodeGroup]) -> list[Commented]:
    """Machines that are there already, reached by SSH.

    Raises:
        SpecError: an address is missing or stands twice, or a group is a spot group.
    """
    own = file.cluster.on_premises
    head_ip = _given(own.head, "cluster.on_premises.head", "give its address")
    hosts = [host for group in groups for host in group.settings.hosts]
    for group in groups:
        _check_hosts(group, hosts)
    common = _common(file, groups)
    data = {
        **{key: value for key, value in common.items() if key != "idle_timeout_minutes"},
        "max_workers": len(hosts),
        "provider": {"type": "local", "head_ip": head_ip, "worker_ips": hosts},
        "auth": {"ssh_user": own.ssh_user, "ssh_private_key": own.ssh_private_key},
        **_start_commands(worker_labels=_labels_by_host(groups), autoscales=False, head_cpus=file.cluster.head.cpus),
    }
    head = _head_lines(file, groups, "on-premises.yaml", "one container on each machine")
    return [Commented(data, head, _notes(groups))]


def _common(file: FleetFile, groups: Sequence[NodeGroup]) -> dict[str, Any]:
    mounts = {TOKEN_FILE: "~/.ray/auth_token"}
    if any(secret.env == "HF_TOKEN" for secret in file.cluster.secrets):
        mounts[_HF_TOKEN_FILE] = "~/.cache/huggingface/token"
    return {
        "cluster_name": file.name,
        "max_workers": sum(group.max_nodes for group in groups),
        "idle_timeout_minutes": 5,
        "docker": {
            "image": file.cluster.image,
            "container_name": "tramontane",
            "pull_before_run": True,
            "run_options": _run_options(),
        },
        "file_mounts": mounts,
    }


def _run_options() -> list[str]:
    """Of `docker run`; Ray adds the host's network, the GPUs and the size of /dev/shm by itself."""
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": TOKEN_FILE,
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HOME": f"{MODELS_PATH}/huggingface",
        "HF_TOKEN_PATH": _HF_TOKEN_FILE,
    }
    return [
        "--user 1000:1000",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--ulimit nofile=65536:65536",
        f"--volume tramontane-models:{MODELS_PATH}",
        *[f"--env {name}={value}" for name, value in variables.items()],
    ]


def _head_type(file: FleetFile, node: dict[str, Any]) -> dict[str, Any]:
    resources = {"CPU": file.cluster.head.cpus, "GPU": 0}
    return {"resources": resources, "min_workers": 0, "max_workers": 0, "node_config": node}


def _worker_type(group: NodeGroup, node: dict[str, Any]) -> dict[str, Any]:
    resources = {"CPU": group.ray_cpus} | ({"GPU": group.num_gpus} if group.num_gpus else {})
    entry: dict[str, Any] = {
        "resources": resources,
        "labels": group.labels,
        "min_workers": group.min_nodes,
        "max_workers": group.max_nodes,
        "node_config": node,
    }
    if group.settings.image is not None:
        entry["docker"] = {"worker_image": group.image}
    return entry


def _aws_node(file: FleetFile, ami: str, machine: str, *, spot: bool) -> dict[str, Any]:
    size = _OS_DISK_GIB + file.cluster.model_cache.size_gib
    disk = {"VolumeSize": size, "VolumeType": "gp3", "Encrypted": True}
    node: dict[str, Any] = {
        "InstanceType": machine,
        "ImageId": ami,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if file.cluster.aws.instance_profile is not None:
        node["IamInstanceProfile"] = {"Arn": file.cluster.aws.instance_profile}
    if spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot"}
    return node


def _gcp_node(file: FleetFile, image: str, machine: str, *, group: NodeGroup | None) -> dict[str, Any]:
    size = _OS_DISK_GIB + file.cluster.model_cache.size_gib
    disk = {"diskSizeGb": size, "sourceImage": image}
    scheduling: dict[str, Any] = {"automaticRestart": False, "onHostMaintenance": "TERMINATE"}
    if group is not None and group.settings.spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    node: dict[str, Any] = {
        "machineType": machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
    }
    return {**node, "scheduling": scheduling} if group is not None else node


def _start_commands(
    *,
    worker_labels: str = "",
    worker_after: str = "",
    autoscales: bool,
    head_cpus: int | None = None,
) -> dict[str, list[str]]:
    """What starts Ray in the containers. Clouds give resources and labels in the environment, per node type."""
    head = "ray start --head --port=6379 --object-manager-port=8076 --dashboard-host=127.0.0.1 --disable-usage-stats"
    if autoscales:
        head += " --autoscaling-config=~/ray_bootstrap_config.yaml"
    if head_cpus is not None:
        head += f" --num-cpus={head_cpus} --num-gpus=0"
    worker = "ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076 --disable-usage-stats"
    worker = f"{worker_labels}{worker} --labels=$LABELS --num-cpus=$CPUS" if worker_labels else worker
    return {
        "head_start_ray_commands": ["ray stop", head],
        "worker_start_ray_commands": ["ray stop", worker, *([worker_after] if worker_after else [])],
    }


def _watch(cloud: str) -> str:
    return f"setsid --fork python -m cluster.preemption {cloud} >> ~/preemption.log 2>&1 < /dev/null"


def _labels_by_host(groups: Sequence[NodeGroup]) -> str:
    """Shell that sets $LABELS and $CPUS by the machine's own address: `ray up` knows one kind of node on-premises."""
    cases = []
    for group in groups:
        labels = ",".join(f"{key}={value}" for key, value in group.labels.items())
        patterns = "|".join(f'*" {host} "*' for host in group.settings.hosts)
        cases.append(f"{patterns}) LABELS={labels} CPUS={group.ray_cpus};;")
    return f'case " $(hostname) $(hostname -I) " in {" ".join(cases)} esac; '


def _check_hosts(group: NodeGroup, hosts: Sequence[str]) -> None:
    gpu = group.settings.gpu
    if not group.settings.hosts:
        raise SpecError(f"cluster.groups: {gpu} has no hosts; list the addresses of its machines")
    for host in group.settings.hosts:
        if hosts.count(host) > 1:
            raise SpecError(f"cluster.groups: host {host} stands twice; a machine has one kind of GPU: leave one out")
    if group.settings.image is not None:
        raise SpecError(
            f"cluster.groups: {gpu} has an image of its own, but on machines of your own all run cluster.image; leave "
            "it out"
        )
    if group.settings.spot:
        raise SpecError(
            f"cluster.groups: {gpu} has spot: true, but nobody takes machines of your own back; leave it out"
        )
    if len(group.settings.hosts) < group.min_nodes:
        raise SpecError(
            f"cluster.groups: the pools of {gpu} take {group.min_nodes} nodes at least, but hosts lists "
            f"{len(group.settings.hosts)}; list more, or lower replicas"
        )


def _machine(group: NodeGroup) -> str:
    where = f"cluster.groups[{group.settings.gpu}].machine"
    return _given(group.settings.machine, where, "name the cloud's machine type with these GPUs")


def _head_machine(file: FleetFile) -> str:
    return _given(file.cluster.head.machine, "cluster.head.machine", f"name one with {file.cluster.head.cpus} CPUs")


def _given(value: str | None, where: str, cure: str) -> str:
    if value is None:
        raise SpecError(f"{where} is missing, and this target needs it: {cure}")
    return value


def _head_lines(file: FleetFile, groups: Sequence[NodeGroup], name: str, what: str) -> list[str]:
    return [
        f"`ray up` file of {file.name}: {what}.",
        "Made by `tramontane manifest`; change the fleet file, not this.",
        *cost_lines(file, groups),
        "Once, before: the token without which nobody can talk to this Ray, in ~/.ray/auth_token.",
        "  ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token",
        "Create, watch, delete (which ends all costs but those of disks that are kept):",
        f"  ray up {name}",
        f"  ray exec {name} 'ray status'",
        f"  ray down {name}",
        "Dashboard, through SSH:",
        f"  ray dashboard {name}",
    ]


def _notes(groups: Sequence[NodeGroup]) -> dict[tuple[str, ...], str]:
    notes: dict[tuple[str, ...], str] = {
        ("docker",): "Everything runs in this container, as user 1000 without capabilities, on the machine's network.",
        ("file_mounts",): "Copied from the machine that runs `ray up`; the token is never in this file.",
        ("available_node_types", _HEAD): "Reads, templates and writes; no GPU, so no replica; never a spot node.",
        ("head_start_ray_commands",): "The dashboard listens on the head alone.",
    }
    for group in groups:
        note = f"At most {group.max_nodes} nodes. The label is what a pool's replicas ask for."
        if group.settings.spot:
            note += (
                " Spot: when the cloud takes a node back, cluster/preemption.py hears of it and has Ray drain the "
                "node. Rows that are done by then are kept; the others run again elsewhere. No row is lost."
            )
        notes[("available_node_types", group.name)] = note
    return notes
