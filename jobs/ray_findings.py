"""The Ray that a run would work in: where it is, who may use it, and what its nodes say of themselves."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.nodes import Node
from jobs.findings import Finding, fine
from jobs.node_facts import NodeFacts, read_node_facts

ANSWER_TIMEOUT_S = 60.0
"""For all nodes together; a worker's start and imports take some 3 s."""

CONNECT_TIMEOUT_S = 5.0

OPEN_TO_ALL = "CVE-2023-48022"
"""Named by the finding that a cluster takes code from whoever reaches it."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the nodes said, by name."""

    facts: dict[str, NodeFacts]
    silent: dict[str, str]
    """Why a node didn't answer."""


def name_nodes(nodes: Sequence[Node]) -> dict[str, Node]:
    """Nodes by address; those that share one, by address and port."""
    addresses = [node.address for node in nodes]
    return {
        node.address if addresses.count(node.address) == 1 else f"{node.address}:{node.port}": node for node in nodes
    }


def ask_nodes(nodes: Mapping[str, Node], *, model_path: str | None, model_folder: str | None) -> Answers:
    """Run `read_node_facts` on each node, in a task that takes none of its resources."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(read_node_facts)
    asked = {}
    for name, node in nodes.items():
        here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        options = task.options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        asked[options.remote(model_path, model_folder)] = name
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    facts: dict[str, NodeFacts] = {}
    silent = {asked[reference]: f"no answer within {ANSWER_TIMEOUT_S:g} s" for reference in late}
    for reference in answered:
        try:
            facts[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            silent[asked[reference]] = str(error).strip().splitlines()[-1][:300]
    return Answers(facts, silent)


def unreachable_finding(named: str | None) -> Finding | None:
    """Say within seconds that nothing answers at a `host:port`; Ray itself takes more than a minute over it."""
    host, _, port = (named or "").rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        cure = "correct --ray or RAY_ADDRESS (the head's `ray start` prints it), start the head, or open the port"
        return Finding("problem", "ray", f"nothing answers at {named}: {error}", cure)
    return None


def silence_findings(answers: Answers) -> list[Finding]:
    """Nodes that can't run this program's code."""
    cure = "install this program and its requirements on every node (cluster/image has a Dockerfile), as it is here"
    return [
        Finding("problem", "ray", f"{name} can't run this program: {why}", cure) for name, why in answers.silent.items()
    ]


def address_finding(named: str | None, *, joined: str, nodes: Sequence[Node]) -> Finding:
    """Which Ray it is; `named` by --ray or RAY_ADDRESS, `joined` is its control plane's address."""
    count = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
    if is_own(named):
        return fine("ray", f"no address is named: a run starts a Ray of its own on this machine ({count})")
    return fine("ray", f"{named} is a cluster with its head at {joined} ({count})")


def auth_findings(named: str | None, *, joined: str, mode: str, token_file_mode: int | None) -> list[Finding]:
    """Who may use this Ray: whoever reaches one without authentication can run any code on it (CVE-2023-48022).

    Args:
        named: as in `address_finding`.
        joined: address of its control plane, `host:port`.
        mode: `token` or `disabled`, as its workers see it.
        token_file_mode: permission bits of this user's token file, None where there is none.
    """
    found = []
    if mode == "token":
        found.append(fine("ray", "it asks for a token, and this machine has the right one"))
    elif is_own(named):
        cure = "unset RAY_AUTH_MODE: Ray then asks for a token by itself"
        found.append(
            Finding("warning", "ray", "a run's own Ray would ask for no token: RAY_AUTH_MODE disables it", cure)
        )
    else:
        cure = "set RAY_AUTH_MODE=token for `ray start` and here, with one token (`ray get-auth-token --generate`)"
        said = f"the cluster at {joined} asks for no token: whoever reaches it can run any code there ({OPEN_TO_ALL})"
        found.append(Finding("warning" if is_loopback(joined) else "problem", "ray", said, cure))
    if token_file_mode is not None and token_file_mode & 0o077:
        said = f"other users of this machine may read Ray's token file (mode {token_file_mode:03o})"
        found.append(Finding("warning", "ray", said, "chmod 600 ~/.ray/auth_token (or $RAY_AUTH_TOKEN_PATH)"))
    return found


def is_own(named: str | None) -> bool:
    """Whether a run starts a Ray of its own, as `jobs.ray_session` decides it."""
    return named in (None, "local")


def is_loopback(address: str) -> bool:
    """Whether `host:port` can only be reached from its own machine."""
    host = address.rpartition(":")[0].strip("[]") or address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
