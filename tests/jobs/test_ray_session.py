"""The Ray that a run starts for itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.ray_session import ray_session
from pipeline.errors import InfrastructureError

SCRIPT = """
import json
import stat
from pathlib import Path
import psutil
from jobs.ray_session import ray_session

def commands():
    return " ".join(part for child in psutil.Process().children(recursive=True) for part in child.cmdline())

if __name__ == "__main__":
    with ray_session():
        import ray
        from ray._raylet import AuthenticationMode, get_authentication_mode
        with ray_session():
            address = ray.get_runtime_context().gcs_address
        facts = {"token": get_authentication_mode() == AuthenticationMode.TOKEN,
                 "private": not stat.S_IMODE((Path.home() / ".ray" / "auth_token").stat().st_mode) & 0o077,
                 "kept": ray.get_runtime_context().gcs_address == address,
                 "idle": [name for name in ("dashboard.py", "monitor.py") if name in commands()],
                 "cpus": ray.cluster_resources()["CPU"]}
    print(json.dumps(facts | {"gone": not ray.is_initialized()}))
"""


def test_a_ray_session_is_its_own_quiet_authenticated_and_gone_afterwards(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("RAY_AUTH_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=90, check=True, env=environment
    )
    facts = json.loads(done.stdout)
    assert facts.pop("cpus") >= 4
    assert facts == {"token": True, "private": True, "kept": True, "idle": [], "gone": True}
    assert done.stderr == ""


def test_a_ray_that_does_not_come_up_is_a_line_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: float) -> None:
        raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("jobs.ray_session._start", start)
    with pytest.raises(InfrastructureError, match="too busy or short of memory; rerun"), ray_session():
        pass
