"""Where the parts of an engine over several nodes find each other, and what vLLM is told of it."""

from __future__ import annotations

import socket

import pytest

import pipeline.meeting
from pipeline.engine_arguments import known_arguments
from pipeline.meeting import PORTS, Meeting, call_meeting
from pipeline.vllm_arguments import span_arguments
from pipeline.vllm_engine import VllmEngineConfig

HERE = "127.0.0.1"


@pytest.fixture(autouse=True)
def _known_as_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", HERE)


def test_the_meeting_place_is_free_and_known_by_the_address_that_an_operator_set() -> None:
    meeting = call_meeting(2)
    assert (meeting.num_nodes, meeting.address) == (2, HERE)
    assert meeting.port in PORTS
    socket.create_server((HERE, meeting.port)).close()


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.meeting, "TRIES", 2)
    with socket.create_server((HERE, 0)) as one, socket.create_server((HERE, 0)) as other:
        ports = [server.getsockname()[1] for server in (one, other)]
        monkeypatch.setattr(pipeline.meeting, "PORTS", ports)
        with pytest.raises(OSError, match="no free port among 2"):
            call_meeting(2)
        free = free_port()
        monkeypatch.setattr(pipeline.meeting, "PORTS", [ports[0], free])
        assert call_meeting(2).port == free


def free_port() -> int:
    with socket.create_server((HERE, 0)) as server:
        return int(server.getsockname()[1])


def test_every_node_is_told_its_own_part_in_words_that_vllm_knows() -> None:
    parts = [span_arguments(Meeting(2, HERE, 20_000), rank) for rank in (0, 1)]
    assert [part.pop("node_rank") for part in parts] == [0, 1]
    assert parts[0] == parts[1]
    assert (parts[0]["nnodes"], parts[0]["master_addr"], parts[0]["master_port"]) == (2, HERE, 20_000)
    known = known_arguments()
    assert known is not None
    assert known.issuperset({"node_rank", *parts[0]})


def test_workers_on_cpu_are_bound_to_cores_of_their_own_node() -> None:
    config = VllmEngineConfig("model", "float32", 512, None, tensor_parallel=4, num_nodes=2, on_cpu=True)
    assert config.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
