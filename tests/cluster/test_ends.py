"""However a run on a shared cluster ends, nothing of it is left there: no placement group, GPU, actor or process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util import placement_group_table

from pipeline.fruitless_losses import MAX_FRUITLESS_LOSSES
from tests.driver_processes import Driver, DriverLauncher, wait_until
from tests.extra_nodes import extra_nodes
from tests.whole_runs import spec_text, token_of, write_prompts

RELEASED_WITHIN_S = 30.0


def _let_it_finish(driver: Driver) -> None:
    assert driver.wait() == 0, driver.said


def _interrupt(driver: Driver) -> None:
    driver.signal_group(signal.SIGINT)
    assert driver.wait() == 130, driver.said


def _kill(driver: Driver) -> None:
    driver.kill()


@pytest.mark.parametrize(
    ("end", "rows"),
    [
        (_kill, 100_000),
        pytest.param(_let_it_finish, 400, marks=pytest.mark.long),
        pytest.param(_interrupt, 100_000, marks=pytest.mark.long),
    ],
)
def test_a_run_on_a_cluster_leaves_nothing_there(
    local_ray: None,
    new_launcher: Callable[..., DriverLauncher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[Driver], None],
    rows: int,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # the cluster demands it, as all that we ship do
    journal = tmp_path / "journal"
    journal.mkdir()
    spec = tmp_path / "job.yaml"
    spec.write_text(spec_text(write_prompts(tmp_path / "prompts.parquet", rows), tmp_path / "out"))
    launcher = new_launcher(replicas=2, gpu="L4", step_delay_s=0.02, journal=str(journal))
    address = ray.get_runtime_context().gcs_address
    with extra_nodes() as nodes:
        nodes.add("L4", 2)
        others = _traces()  # of a fleet that other tests may share
        driver = launcher.start(spec, "--ray", address)
        wait_until(lambda: _has_work(journal) or driver.ended, "both replicas work")
        replicas = [int(log.stem) for log in journal.glob("*.log")]
        assert len(replicas) == 2, driver.said
        assert ray.available_resources().get("GPU", 0) == 0 or driver.ended
        end(driver)
        ended = time.monotonic()
        wait_until(lambda: _released(replicas, others), "all is released", deadline_s=RELEASED_WITHIN_S)
        print(f"released {time.monotonic() - ended:.1f} s after the driver's end")


def _has_work(journal: Path) -> bool:
    return sum(log.stat().st_size > 0 for log in journal.glob("*.log")) == 2


@pytest.mark.parametrize(
    ("engines", "because"),
    [
        ("crash on every row", "replicas in a row died without finishing a row"),
        ("don't start", "5 starts failed in a row"),
    ],
)
@pytest.mark.long
def test_a_run_that_fails_on_a_cluster_leaves_nothing_there(
    local_ray: None,
    new_launcher: Callable[..., DriverLauncher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engines: str,
    because: str,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    journal = tmp_path / "journal"
    journal.mkdir()
    spec = tmp_path / "job.yaml"
    spec.write_text(spec_text(write_prompts(tmp_path / "prompts.parquet", 20_000), tmp_path / "out"))
    fault = (
        {"faults": {token_of("question"): "crash"}, "journal": str(journal)}
        if engines == "crash on every row"
        else {"fail_start": "no such weights"}
    )
    with extra_nodes() as nodes:
        nodes.add("L4", 2)
        others = _traces()
        launcher = new_launcher(replicas=2, gpu="L4", **fault)
        driver = launcher.start(spec, "--ray", ray.get_runtime_context().gcs_address)
        assert driver.wait() == 3, driver.said
        assert because in driver.said
        ended = time.monotonic()
        replicas = [int(log.stem) for log in journal.glob("*.log")]
        wait_until(lambda: _released(replicas, others), "all is released", deadline_s=RELEASED_WITHIN_S)
        print(f"released {time.monotonic() - ended:.1f} s after the driver's end")
    assert len(replicas) >= MAX_FRUITLESS_LOSSES or engines == "don't start"


def _released(replicas: list[int], others: set[Any]) -> bool:
    gone = not any(psutil.pid_exists(pid) for pid in replicas)
    return gone and _traces() <= others and ray.available_resources().get("GPU", 0) == 2


def _traces() -> set[Any]:
    """Placement groups and processes of runs."""
    table = placement_group_table()
    groups = {key for key, group in table.items() if group["state"] != "REMOVED"}
    return groups | {process.pid for process in psutil.process_iter(["cmdline"]) if _is_ours(process)}


def _is_ours(process: psutil.Process) -> bool:
    title = " ".join(process.info["cmdline"] or [])
    mine = any(parent.pid == os.getpid() for parent in process.parents())
    return mine and title.startswith(("ray::Fleet", "ray::Replica", "ray::RunMonitor"))


def test_a_pool_that_the_cluster_can_never_hold_is_refused_in_seconds(
    local_ray: None,
    new_launcher: Callable[..., DriverLauncher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    spec = tmp_path / "job.yaml"
    spec.write_text(spec_text(write_prompts(tmp_path / "prompts.parquet", 4), tmp_path / "out"))
    began = time.monotonic()
    driver = new_launcher(replicas=2, gpu="H100-80G").start(spec, "--ray", ray.get_runtime_context().gcs_address)
    assert driver.wait() == 2
    assert time.monotonic() - began < 30, "3 s on an idle machine"
    assert "needs 2 replicas with 1 GPU of H100-80G on one node, which this cluster can never hold" in driver.said
    assert not (tmp_path / "out").exists()
