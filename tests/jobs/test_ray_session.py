"""The Ray that a run starts for itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.lean_ray import without_data_actors
from jobs.ray_session import QUIET, ray_session
from pipeline.errors import InfrastructureError
from tests.whole_runs import make_job, run_scripted, write_prompts

SCRIPT = """
import gc
import json
import os
import stat
from pathlib import Path
import psutil
from jobs.ray_session import QUIET, ray_session

def commands():
    return " ".join(part for child in psutil.Process().children(recursive=True) for part in child.cmdline())

def told():
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    return [name for raylet in raylets for name in QUIET if raylet.environ().get(name) == QUIET[name]]

if __name__ == "__main__":
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    with ray_session():
        import ray
        from ray._raylet import AuthenticationMode, get_authentication_mode
        with ray_session():
            address = ray.get_runtime_context().gcs_address
        facts = {"token": get_authentication_mode() == AuthenticationMode.TOKEN,
                 "private": not stat.S_IMODE((Path.home() / ".ray" / "auth_token").stat().st_mode) & 0o077,
                 "kept": ray.get_runtime_context().gcs_address == address,
                 "idle": [name for name in ("dashboard.py", "monitor.py") if name in commands()],
                 "collects": gc.get_threshold() == usual, "told": told(),
                 "left": [name for name in QUIET if name in os.environ],
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
    assert facts.pop("collects")
    assert facts.pop("left") == []
    assert facts.pop("told") == list(QUIET)
    assert facts == {"token": True, "private": True, "kept": True, "idle": [], "gone": True}
    assert done.stderr == ""


@pytest.mark.usefixtures("local_ray")
def test_a_run_starts_no_actors_of_ray_data_beside_its_own(tmp_path: Path) -> None:
    import ray

    before = ray._private.state.actors()
    assert run_scripted(make_job(write_prompts(tmp_path / "in.parquet", 8), tmp_path / "out"))["exit_code"] == 0
    names = {each["ActorClassName"] for actor, each in ray._private.state.actors().items() if actor not in before}
    assert any("GenerateStage" in name for name in names)
    assert not [name for name in names if re.search("Coordinator|Tracker|StatsActor", name)]


def test_a_ray_without_what_is_replaced_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data._internal.execution.operators import actor_pool_map_operator

    monkeypatch.delattr(actor_pool_map_operator, "get_actor_locations")
    kept = actor_pool_map_operator.get_or_create_actor_location_tracker
    with without_data_actors():
        assert actor_pool_map_operator.get_or_create_actor_location_tracker is kept


def test_a_ray_that_does_not_come_up_is_a_line_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: float) -> None:
        raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("jobs.ray_session._start", start)
    with pytest.raises(InfrastructureError, match="too busy or short of memory; rerun"), ray_session():
        pass
