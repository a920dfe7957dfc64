"""Where the parts of an engine over several nodes find each other: an address and a free port on the first node."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import dataclass

PORTS = range(20_000, 32_768)
"""Above those of Ray's workers (10,002 to 19,999), and below those that Linux hands out: between choice and use, a few
seconds, neither takes one."""
TRIES = 100


@dataclass(frozen=True, slots=True)
class Meeting:
    """What every part of one engine has to know."""

    num_nodes: int
    address: str
    """Of the first node."""
    port: int


def call_meeting(num_nodes: int) -> Meeting:
    """Choose a meeting place on this node, by the address that Ray's other nodes know it by."""
    address = own_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in random.SystemRandom().sample(PORTS, TRIES):
        with socket.socket(family, socket.SOCK_STREAM) as taken:
            try:
                taken.bind((address, port))
            except OSError:
                continue
            return Meeting(num_nodes, address, port)
    raise OSError(f"no free port among {TRIES} of {PORTS[0]} to {PORTS[-1]} on {address}")


def own_address() -> str:
    """Address of this node for other nodes: `VLLM_HOST_IP` where an operator has set it, else Ray's."""
    import ray

    return os.environ.get("VLLM_HOST_IP") or str(ray.util.get_node_ip_address())
