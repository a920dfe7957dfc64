"""Two thousand requests that a machine made up, ten thousand hostile ones, and two hundred clients that hang up."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.driver_processes import wait_until
from tests.endpoints import HOSTILE, Served, served
from tests.made_up_requests import ask_for_anything
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, token_of

BODY = b'{"model":"mixtral","messages":[{"role":"user","content":"hello"}]}'


@pytest.fixture(scope="module")
def endpoint(_ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    batches = str(tmp_path_factory.mktemp("batches"))
    config = ScriptedConfig(max_num_seqs=256, step_delay_s=0.02, moe=TINY_MOE, faults={token_of("endless"): "never"})
    with served("mixtral", config, moe=TINY_MOE, max_body_bytes=65536, body_timeout_s=2.0, batches=batches) as running:
        yield running


def endpoint_memory() -> int:
    """Bytes that the ingress and Serve's proxy hold."""
    found = [p for p in psutil.Process().children(recursive=True) if "ray::" in " ".join(p.cmdline())]
    serving = [p for p in found if "Serve" in " ".join(p.cmdline()) or "Proxy" in " ".join(p.cmdline())]
    assert serving
    return sum(p.memory_info().rss for p in serving)


def attack(endpoint: Served, http: httpx.Client, number: int) -> int:
    """One hostile request; returns the status, 0 for none."""
    dice = random.Random(number)
    if number % 20 == 7:  # no length is said, and there is no end
        pieces = (b"[" * 50_000 for _ in range(200))
        with contextlib.suppress(httpx.TransportError):  # the answer comes, and the line is cut, before all is sent
            return http.post(endpoint.url + "/v1/chat/completions", content=pieces).status_code
        return 0
    if number % 20:
        headers = {"Content-Type": "application/json"}
        return http.post(
            endpoint.url + "/v1/chat/completions", content=dice.choice(HOSTILE), headers=headers
        ).status_code
    host, port = endpoint.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {dice.choice([10, 10**12])}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + b"{" * dice.randrange(8))
        if dice.random() < 0.5:  # cut off
            return 0
        line = connection.recv(4096).split(b" ")
        return int(line[1]) if len(line) > 1 else 0


@pytest.mark.long
def test_two_thousand_requests_that_are_made_up_are_answered_as_the_document_says(endpoint: Served) -> None:
    seen = ask_for_anything(endpoint, 2000)
    print(*sorted(seen.items()), sep="\n")
    assert seen.total() >= 2000
    assert not any(status >= 500 for _, _, status in seen)


@pytest.mark.long
def test_ten_thousand_hostile_requests_cost_bounded_memory_and_healthy_ones_are_served(endpoint: Served) -> None:
    statuses: Counter[int] = Counter()
    healthy: list[int] = []
    memory: list[int] = []
    over = threading.Event()

    def ask_meanwhile() -> None:
        headers = {"Content-Type": "application/json"}
        while not over.wait(0.2):
            answer = httpx.post(endpoint.url + "/v1/chat/completions", content=BODY, headers=headers, timeout=60)
            healthy.append(answer.status_code)
            memory.append(endpoint_memory())

    with ThreadPoolExecutor(17) as pool, httpx.Client(verify=False, timeout=60) as http:
        list(pool.map(lambda n: attack(endpoint, http, n), range(500)))
        before = endpoint_memory()
        asking = pool.submit(ask_meanwhile)
        try:
            statuses.update(pool.map(lambda n: attack(endpoint, http, n), range(500, 10_500)))
        finally:
            over.set()
        asking.result()
    print(statuses, f"{len(healthy)} healthy ones; at most {(max(memory) - before) / 2**20:.1f} MiB more")
    assert all(status == 0 or 400 <= status < 500 for status in statuses)
    assert len(healthy) > 20
    assert set(healthy) == {200}
    assert max(memory) - before < 150 * 2**20
    wait_until(lambda: endpoint.num_unfinished() == 0, "nothing is left", deadline_s=10)


@pytest.mark.long
def test_two_hundred_clients_that_hang_up_leave_nothing_within_two_seconds(endpoint: Served) -> None:
    body = b'{"model":"mixtral","stream":true,"messages":[{"role":"user","content":"an endless story"}]}'
    host, port = endpoint.url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    connections = []
    for _ in range(200):
        connections.append(socket.create_connection((host, int(port)), timeout=30))
        connections[-1].sendall(head.encode() + b"\r\n\r\n" + body)
    for connection in connections:  # each is in the middle of its answer
        while b"data: " not in (told := connection.recv(65536)):
            assert told, "it was cut off"
    assert endpoint.num_unfinished() == 200
    for connection in connections:
        connection.close()
    left = time.monotonic()
    wait_until(lambda: endpoint.num_unfinished() == 0, "nothing is left", deadline_s=30)
    took_s = time.monotonic() - left
    print(f"gone after {took_s:.2f} s")
    assert took_s < 2
