"""A warm fleet by its commands alone, on a head with a token, with real vLLM: up, run, serve, down; nothing is left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.driver_processes import wait_until
from tests.endpoints import free_port
from tests.ray_head import Head, ray_head
from tests.whole_runs import check_whole, spec_text, write_prompts

MODEL = {"source": "random", "dtype": "float32", "max_model_len": 512}
OURS = ("ray::Fleet", "ray::Replica", "VLLM::")
LOOK = """
import json, ray
from ray.util import placement_group_table
ray.init(address="ADDRESS", log_to_driver=False, logging_level="ERROR")
states = [group["state"] for group in placement_group_table().values()]
print(json.dumps({"live": [state for state in states if state != "REMOVED"],
                  "free": ray.available_resources()["CPU"], "all": ray.cluster_resources()["CPU"]}))
"""

pytestmark = pytest.mark.long


@pytest.fixture
def head() -> Iterator[Head]:
    with ray_head({}) as started:
        yield started


def run(head: Head, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, env=head.environment(), capture_output=True, text=True, timeout=300)


def gcs_address(head: Head) -> str:
    """As its node was told."""
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    found = (re.search(r"--gcs-address=(\S+)", line) for line in lines if str(head.folder) in line)
    return next(each[1] for each in found if each)


def processes(head: Head) -> list[str]:
    """Titles of this head's fleets and engines."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        title = " ".join(process.info["cmdline"] or []).strip()
        above = [" ".join(parent.cmdline()) for parent in process.parents()] if title.startswith(OURS) else []
        if any(str(head.folder) in each for each in above):
            found.append(title)
    return found


def serve_by_command(head: Head, command: list[str]) -> None:
    """Serve from the fleet until the first answer, and interrupt it."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    body = {"model": "warm", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    began = time.monotonic()
    serving = subprocess.Popen([*command, "--port", str(port)], env=head.environment(), stderr=subprocess.PIPE)

    def answered() -> bool:
        try:
            return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(answered, "its first answer")
        print(f"an endpoint's first answer came {time.monotonic() - began:.1f} s after the command")
        serving.send_signal(signal.SIGINT)
        _, said = serving.communicate(timeout=60)
        assert serving.returncode == 0, said
    finally:
        serving.kill()
        serving.wait()


@pytest.mark.timeout(600)
def test_up_run_run_down_leave_nothing_behind(head: Head, tmp_path: Path) -> None:
    address = gcs_address(head)
    tramontane, ray = str(Path(sys.executable).with_name("tramontane")), ("--ray", address)
    fleet = {"name": "warm", "model": MODEL, "fleet": {"pools": [{"gpu": "cpu", "replicas": 1}]}}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    up = run(head, tramontane, "up", str(tmp_path / "fleet.yaml"), *ray)
    assert up.returncode == 0, up.stderr
    assert "use it with `fleet: {attach: warm}`" in up.stderr

    status = run(head, tramontane, "fleet", "warm", *ray, "--json")
    assert json.loads(status.stdout)["replicas_up"] == 1, status.stderr
    assert {title.split("::")[1].split(".")[0] for title in processes(head)} >= {"Fleet", "Replica"}

    rows = write_prompts(tmp_path / "in.parquet", 100)
    for name in ("first", "second"):
        spec = tmp_path / f"{name}.yaml"
        spec.write_text(spec_text(rows, tmp_path / name, model=MODEL, fleet={"attach": "warm"}))
        began = time.monotonic()
        ended = run(head, tramontane, "run", str(spec), *ray)
        print(f"the {name} run took {time.monotonic() - began:.1f} s")
        assert ended.returncode == 0, ended.stderr
        check_whole(tmp_path / name, 100)

    serve_by_command(head, [tramontane, "serve", "warm", *ray])

    down = run(head, tramontane, "down", "warm", *ray)
    assert down.returncode == 0, down.stderr
    assert "fleet warm is down" in down.stdout
    wait_until(lambda: not processes(head), "its processes are gone", deadline_s=30)
    look = run(head, sys.executable, "-c", LOOK.replace("ADDRESS", address))
    seen = json.loads(look.stdout.splitlines()[-1])
    assert seen["live"] == []
    assert seen["free"] == seen["all"]
    gone = run(head, tramontane, "fleet", "warm", *ray)
    assert gone.returncode == 2
    assert "warm" in gone.stderr
