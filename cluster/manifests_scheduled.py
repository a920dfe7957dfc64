"""Manifests for jobs by the clock: a CronJob whose pod makes RayJobs, or KubeRay's own RayCronJob. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from cluster.fleet_file import FleetFile
from cluster.manifest_notes import cluster_notes, cost_lines
from cluster.manifest_pods import JOB_FOLDER, job_map_name
from cluster.manifests_kuberay import (
    BACKOFF,
    checked_name,
    head_of,
    job_map,
    job_spec,
    small_pod,
    token_lines,
    use_lines,
)
from cluster.node_groups import NodeGroup
from cluster.scheduled_rayjob import TICK
from cluster.yaml_text import Commented, yaml_text
from pipeline.errors import SpecError

_POD = "make-rayjob"
_FAILURE_POLICY = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": _POD, "operator": "In", "values": [1, 2, 130]}},
    ]
}


def cronjob(file: FleetFile, groups: Sequence[NodeGroup], job_text: str, output: str | None) -> list[Commented]:
    """A RayJob at every tick of a clock, unless the last one still runs.

    Each tick has a folder of its own below `output`; None for a job that keeps such folders by itself.
    """
    name = checked_name(file)
    namespace = file.cluster.namespace
    entrypoint = f"tramontane run {JOB_FOLDER}/job.yaml"
    if output is not None:
        path = f"{output.rstrip('/')}/{TICK}"
        entrypoint += f" --set output.path={shlex.quote(path)}"
    # No repetitions by KubeRay, which doesn't look at exit codes: the pod of the tick does.
    spec = {**job_spec(file, groups, entrypoint), "backoffLimit": 0}
    job = {**head_of("ray.io/v1", "RayJob", name, namespace), "spec": spec}
    head = [
        f"CronJob {name}: at `{file.cluster.schedule.cron}` ({file.cluster.schedule.time_zone}) makes a RayJob and",
        "waits for it; the Job of a tick ends as its RayJob did. Exit code 3 is tried again, twice.",
        "A plain CronJob, not KubeRay's RayCronJob: that one is alpha, lets runs overlap and replays missed ticks.",
        *([f"Each tick writes to {output.rstrip('/')}/<tick>, e.g. 2026-11-21T0200Z."] if output is not None else []),
        "Made by `tramontane manifest`; change the fleet file, not this. Needs KubeRay 1.7 and a GPU device plugin.",
        *cost_lines(file, groups, while_="a tick runs"),
        *token_lines(file),
        *use_lines(f"cronjob/{name}", namespace, file="cronjob.yaml"),
        "Now, not at the next tick; and stop one tick, its cluster included:",
        f"  kubectl -n {namespace} create job {name}-now --from=cronjob/{name}",
        f"  kubectl -n {namespace} delete job NAME",
    ]
    files = {"job.yaml": job_text, "rayjob.yaml": yaml_text([Commented(job)])}
    return [Commented(_cron_spec(file, name), head, _CRON_NOTES), job_map(file, files), *_permissions(name, namespace)]


def raycronjob(file: FleetFile, groups: Sequence[NodeGroup], job_text: str, output: str | None) -> list[Commented]:
    """KubeRay's own schedule of RayJobs. Of jobs that do only what is new: nothing else keeps its runs apart.

    Raises:
        SpecError: the job would do everything at each tick.
    """
    if output is not None:
        raise SpecError(
            "--raycronjob: a RayCronJob lets runs overlap, repeats missed ticks and can't name them, so all its runs "
            "would have one output; give the job input.new: since_last_run, or leave --raycronjob out"
        )
    name, namespace, schedule = checked_name(file), file.cluster.namespace, file.cluster.schedule
    entrypoint = f"tramontane run {JOB_FOLDER}/job.yaml"
    spec = {
        "schedule": schedule.cron,
        "timeZone": schedule.time_zone,
        "jobTemplate": job_spec(file, groups, entrypoint),
    }
    head = [
        f"RayCronJob {name}: at `{schedule.cron}` ({schedule.time_zone}) makes a RayJob.",
        "Alpha in KubeRay 1.7, and off: the operator needs the feature gate RayCronJob=true. It has no policy against",
        "runs that overlap, and makes up for every tick that it missed. The lease of the output refuses a second run",
        "(exit code 2), and one that finds nothing new ends at once; each costs the start of a cluster all the same.",
        "Made by `tramontane schedule`; change the fleet file, not this. Needs a GPU device plugin.",
        *cost_lines(file, groups, while_="a tick runs"),
        *token_lines(file),
        *use_lines(f"raycronjob/{name}", namespace, file="cronjob.yaml"),
    ]
    data = {**head_of("ray.io/v1", "RayCronJob", name, namespace), "spec": spec}
    return [
        Commented(data, head, cluster_notes(("spec", "jobTemplate", "rayClusterSpec"), groups)),
        job_map(file, {"job.yaml": job_text}),
    ]


def _permissions(name: str, namespace: str) -> list[Commented]:
    """May make and look at RayJobs in its namespace; nothing else."""
    group = "rbac.authorization.k8s.io"
    rules = [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    role = {"apiGroup": group, "kind": "Role", "name": name}
    subjects = [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]
    return [
        Commented(head_of("v1", "ServiceAccount", name, namespace), [f"What CronJob {name} acts as. Costs nothing."]),
        Commented(
            {**head_of(f"{group}/v1", "Role", name, namespace), "rules": rules},
            ["What it may do: make RayJobs here and look at them. Costs nothing."],
        ),
        Commented(
            {**head_of(f"{group}/v1", "RoleBinding", name, namespace), "roleRef": role, "subjects": subjects},
            ["The two joined. Costs nothing."],
        ),
    ]


def _cron_spec(file: FleetFile, name: str) -> dict[str, Any]:
    pod = small_pod(_POD, file)
    fields = {
        "JOB_NAME": "metadata.labels['batch.kubernetes.io/job-name']",
        "JOB_UID": "metadata.labels['batch.kubernetes.io/controller-uid']",
        "NAMESPACE": "metadata.namespace",
    }
    pod["containers"][0] |= {
        "command": ["python", "-m", "cluster.scheduled_rayjob", f"{JOB_FOLDER}/rayjob.yaml"],
        "env": [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in fields.items()],
        "volumeMounts": [{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}],
    }
    pod |= {
        "serviceAccountName": name,
        "volumes": [{"name": "job", "configMap": {"name": job_map_name(file)}}],
    }
    return {
        **head_of("batch/v1", "CronJob", name, file.cluster.namespace),
        "spec": {
            "schedule": file.cluster.schedule.cron,
            "timeZone": file.cluster.schedule.time_zone,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "successfulJobsHistoryLimit": 7,
            "failedJobsHistoryLimit": 7,
            "jobTemplate": {
                "spec": {"backoffLimit": BACKOFF, "podFailurePolicy": _FAILURE_POLICY, "template": {"spec": pod}}
            },
        },
    }


_CRON_NOTES = {
    ("spec", "concurrencyPolicy"): "No second run while one is going: the pod lives as long as its RayJob.",
    ("spec", "startingDeadlineSeconds"): "A tick missed by more than an hour is left out, not made up for.",
    ("spec", "jobTemplate", "spec", "backoffLimit"): (
        "A pod that is lost finds the RayJobs of its tick by name, and goes on waiting for the last."
    ),
    ("spec", "jobTemplate", "spec", "podFailurePolicy"): "1, 2 and 130 would end the same way again, or were meant.",
}
