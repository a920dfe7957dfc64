"""Fault campaign: a whole run while replicas are killed and nodes are lost, against the same run undisturbed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster.pools import PoolPlan, SlotShape
from jobs.run import RunOptions, run_job
from tests.extra_nodes import ExtraNodes, extra_nodes
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, check_whole, make_job, results, write_prompts

NUM_NODES = 3
GPUS_PER_NODE = 2
MAX_ATTEMPTS = 10
"""Kills strike the replica that began rows last, often the one that runs suspects: with the usual three attempts, of
10,000 rows two or three were hit three times, the last time alone, which is what a row does that kills its engine."""


class Disturbance:
    """Kills replicas by pid and loses nodes, which are replaced, on a thread of its own.

    A node's replacement starts beside the events that follow: a raylet takes seconds, more on a busy machine, and a
    run of 960 rows was over before the last kill.
    """

    def __init__(self, nodes: ExtraNodes, journal: Path, *, kills: int, node_losses: int) -> None:
        self._nodes = nodes
        self._journal = journal
        self._events = ["kill"] * kills + ["node"] * node_losses
        random.Random(7).shuffle(self._events)
        self._interval_s = 0.0
        self._added: list[str] = []
        self._replacing: threading.Thread | None = None
        self.done: list[str] = []
        self._thread = threading.Thread(target=self._disturb, daemon=True)
        self._over = threading.Event()

    def add_nodes(self) -> None:
        for _ in range(NUM_NODES):
            self._add_node()

    def start(self, *, over_s: float) -> None:
        """Spread the events evenly over `over_s` seconds from the first row begun."""
        self._interval_s = over_s / len(self._events)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(60)
        self._wait_for_replacement()
        assert len(self._added) == NUM_NODES, "a lost node's replacement didn't start"

    def _disturb(self) -> None:
        while not any(self._journal.glob("*.log")):
            if self._over.wait(0.05):
                return
        began = time.monotonic()
        for number, event in enumerate(self._events, start=1):
            if self._over.wait(max(0.0, began + number * self._interval_s - time.monotonic())):
                return
            if event == "kill" and self._kill():
                self.done.append("kill")
            if event == "node":
                self._wait_for_replacement()
                self._nodes.lose(self._added.pop(0))
                self._replacing = threading.Thread(target=self._add_node, daemon=True)
                self._replacing.start()
                self.done.append("node")

    def _add_node(self) -> None:
        self._added.append(self._nodes.add("L4", GPUS_PER_NODE))

    def _wait_for_replacement(self) -> None:
        if self._replacing is not None:
            self._replacing.join(60)

    def _kill(self) -> bool:
        """SIGKILL the replica that began rows last; it is known to work."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not self._over.is_set():
            for log in sorted(self._journal.glob("*.log"), key=lambda log: -log.stat().st_mtime):
                pid = int(log.stem)
                if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        return True
            time.sleep(0.1)
        return False


@pytest.mark.parametrize(
    ("rows", "kills", "node_losses", "step_s"),
    [
        (960, 2, 1, 0.3),
        pytest.param(10_000, 50, 10, 0.5, marks=[pytest.mark.long, pytest.mark.timeout(1200)]),
    ],
)
def test_kills_and_lost_nodes_change_nothing_but_the_time(
    local_ray: None, tmp_path: Path, rows: int, kills: int, node_losses: int, step_s: float
) -> None:
    journals = {name: tmp_path / f"journal-{name}" for name in ("calm", "disturbed")}
    took: dict[str, float] = {}
    prompts = write_prompts(tmp_path / "prompts.parquet", rows)
    with extra_nodes() as nodes:
        disturbance = Disturbance(nodes, journals["disturbed"], kills=kills, node_losses=node_losses)
        disturbance.add_nodes()
        for name, journal in journals.items():
            journal.mkdir()
            if name == "disturbed":
                disturbance.start(over_s=rows / 8 * step_s / NUM_NODES / GPUS_PER_NODE * 0.8)
            began = time.monotonic()
            summary = run_job(
                make_job(prompts, tmp_path / name, limits={"max_attempts": MAX_ATTEMPTS}),
                RunOptions(quiet=True),
                say=[].append,
                pools=[_pool(journal, step_s)],
            )
            took[name] = time.monotonic() - began
            assert summary["exit_code"] == 0
        disturbance.stop()
    kinds = [loss["kind"] for loss in summary["this_execution"]["replica_losses"]]
    print(f"{len(kinds)} replicas lost, {disturbance.done.count('node')} nodes; {took}")
    assert disturbance.done.count("node") == node_losses
    assert disturbance.done.count("kill") == kills
    # A lost node takes up to two replicas along; none if both of its had just been killed.
    assert len(kinds) >= kills
    calm, disturbed = (check_whole(tmp_path / name, rows) for name in journals)
    assert results(tmp_path / "disturbed") == results(tmp_path / "calm")
    assert disturbed.to_json_bytes() == calm.to_json_bytes()
    slack_s = 10 if rows < 1000 else 0  # of a short run the replacements' start is a large part
    assert took["disturbed"] <= 2 * took["calm"] + slack_s


def _pool(journal: Path, step_s: float) -> PoolPlan:
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=step_s, moe=TINY_MOE, journal=str(journal))
    shape = SlotShape(num_gpus=1, gpu_type="L4", gpu_labels=("L4",))
    return PoolPlan("L4", 1, config, max_num_seqs=8, shape=shape, max_replicas=NUM_NODES * GPUS_PER_NODE)
