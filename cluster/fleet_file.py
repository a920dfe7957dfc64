"""A fleet file: which model on which GPUs, and on which machines. `up` and `manifest` read it.

Everything below `cluster` concerns manifests only, and has a default or can be worked out from the pools where that is
possible. Holds no secret: those are named, and live in Kubernetes or in files of whoever runs `ray up`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.serve_settings import ServeSettings
from cluster.settings import FleetSettings
from pipeline.settings import ModelSettings, RoutingSettings, Settings, contradiction

GpuName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]


class HeadSettings(Settings):
    """The node without GPUs that reads, templates and writes rows, and holds the driver. Never a spot node."""

    cpus: Annotated[int, Field(ge=2, le=1024)] = 8
    """Cores; reading, templating and writing run on them."""
    memory_gib: Annotated[int, Field(ge=4, le=65536)] = 32
    """Memory, the object store's included."""
    machine: str | None = None
    """The cloud's machine type, e.g. `m7i.2xlarge`; needed for `ray up` on a cloud."""
    usd_per_node_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Its price, for the sum at the top of a manifest."""


class NodeGroupSettings(Settings):
    """Equal nodes of one GPU type."""

    gpu: GpuName
    """GPU type as in `fleet.pools`, or `cpu`."""
    gpus_per_node: Annotated[int, Field(ge=1, le=64)] = 8
    """GPUs of each node; means nothing for `cpu`."""
    min_nodes: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Nodes that are always there; null for as many as the pools' fewest replicas take."""
    max_nodes: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Nodes at most; null for as many as the pools' most replicas take, or as there are `hosts`."""
    spot: bool = False
    """Whether the cloud may take the nodes back at short notice, for a lower price."""
    drain_s: Annotated[int, Field(ge=5, le=7200)] | None = None
    """Seconds a pod may take to hand over its work once it is told to go; null for what the platform leaves it."""
    machine: str | None = None
    """The cloud's machine type, e.g. `p5.48xlarge`; on Kubernetes it restricts pods to such nodes."""
    cpus: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Cores for each node's pod; null for 4 per GPU."""
    memory_gib: Annotated[int, Field(ge=4, le=65536)] | None = None
    """Memory for each node's pod; null for 24 GiB per GPU."""
    image: str | None = None
    """Container image, where it differs from `cluster.image`."""
    hosts: list[str] = Field(default_factory=list)
    """On-premises only: addresses of these nodes."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Kubernetes node labels that pods of this group ask for, beyond machine type and spot."""
    tolerations: list[dict[str, Any]] = Field(default_factory=list)
    """Kubernetes tolerations, beyond those for GPUs and spot."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels, beyond GPU type and market."""
    usd_per_node_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Price of one node, for the sum at the top of a manifest."""


class SecretSettings(Settings):
    """One environment variable filled from a Kubernetes secret."""

    env: EnvName
    """Name of the variable, e.g. `HF_TOKEN` or `AWS_SECRET_ACCESS_KEY`."""
    secret: ObjectName
    """Name of the secret."""
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]{1,253}$")]
    """Key in the secret."""


class ModelCacheSettings(Settings):
    """Where nodes keep downloaded models."""

    size_gib: Annotated[int, Field(ge=1, le=65536)] = 250
    """Room for models on each node; Mixtral 8x7B in bf16 takes 87 GiB, 8x22B 262."""
    claim: ObjectName | None = None
    """A PersistentVolumeClaim (ReadWriteMany) for all nodes; null for each node's own disk, gone with its pod."""


class VolumeSettings(Settings):
    """A volume with rows, for paths that are not in an object store."""

    claim: ObjectName
    """The PersistentVolumeClaim, ReadWriteMany."""
    path: Annotated[str, Field(pattern=r"^/[^\s:]+$")]
    """Where it is mounted in every pod."""


class ScheduleSettings(Settings):
    """When the `cronjob` target runs its job."""

    cron: Annotated[str, Field(pattern=r"^\S+( \S+){4}$")] = "0 2 * * *"
    """Five fields: minute, hour, day, month, weekday."""
    time_zone: str = "Etc/UTC"
    """Of the schedule, an IANA name."""


class AwsSettings(Settings):
    """For `ray up` on AWS."""

    region: str = "us-west-2"
    """Region of all nodes."""
    zones: str | None = None
    """Availability zones to try, in order, comma-separated; null for any."""
    ami: str | None = None
    """Machine image of the region with Docker, the NVIDIA container toolkit and a driver for CUDA 13."""
    instance_profile: str | None = None
    """ARN of the profile whose role may read the input and write the output; else keys would be needed on nodes."""


class GcpSettings(Settings):
    """For `ray up` on Google Cloud."""

    project: str | None = None
    """Project id."""
    region: str = "us-central1"
    """Region of all nodes."""
    zone: str = "us-central1-a"
    """Zone of all nodes; it must have the GPUs."""
    source_image: str | None = None
    """Disk image with Docker, the NVIDIA container toolkit and a driver for CUDA 13."""


class OnPremisesSettings(Settings):
    """For `ray up` on machines of your own."""

    head: str | None = None
    """Address of the head."""
    ssh_user: str = "ubuntu"
    """Who may log in on every machine, with the key below, and use Docker."""
    ssh_private_key: str = "~/.ssh/id_ed25519"
    """Path of the key on the machine that runs `ray up`."""


class ClusterSettings(Settings):
    """Machines."""

    image: str | None = None
    """Container image with this program, built from `cluster/image/Dockerfile.gpu`; name a version or digest."""
    namespace: ObjectName = "default"
    """Kubernetes namespace."""
    kubernetes: Literal["gke", "eks", "aks", "other"] = "other"
    """Whose Kubernetes; decides how spot nodes are asked for. `eks` means managed node groups; for Karpenter give
    `other` and the group's `node_selector`."""
    head: HeadSettings = HeadSettings()
    groups: list[NodeGroupSettings] = Field(default_factory=list)
    """One entry per GPU type of `fleet.pools`."""
    auth_secret: ObjectName | None = None
    """Kubernetes secret whose key `auth_token` holds the cluster's token; null for `<name>-ray-token`."""
    secrets: list[SecretSettings] = Field(default_factory=list)
    """Environment variables of all pods that come from secrets."""
    service_account: ObjectName | None = None
    """Kubernetes service account of head and workers, e.g. one bound to a cloud role; null for the namespace's own."""
    model_cache: ModelCacheSettings = ModelCacheSettings()
    volumes: list[VolumeSettings] = Field(default_factory=list)
    """Volumes with rows."""
    schedule: ScheduleSettings = ScheduleSettings()
    aws: AwsSettings = AwsSettings()
    gcp: GcpSettings = GcpSettings()
    on_premises: OnPremisesSettings = OnPremisesSettings()


class FleetFile(Settings):
    """A warm fleet, and the machines it runs on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Letters, digits, dot, dash and underscore; at most 64; for Kubernetes lower case and dashes only, at most 35."""
    model: ModelSettings
    routing: RoutingSettings = RoutingSettings()
    fleet: FleetSettings
    serve: ServeSettings = ServeSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _is_a_fleet(self) -> FleetFile:
        if self.fleet.attach is not None:
            raise contradiction("a fleet file says what a fleet is; leave out fleet.attach, or write a job", at="fleet")
        return self
