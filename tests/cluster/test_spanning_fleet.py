"""Replicas over several nodes: real Ray nodes with logical GPUs, one actor on each, scripted engines that meet."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.util import placement_group_table

from cluster.capacity import check_capacity
from cluster.fleet import start_fleet, stop_fleet
from cluster.fleet_plan import nodes_of_replica
from cluster.hardware import seen_hardware
from cluster.nodes import read_nodes
from cluster.pools import PoolPlan, slot_shape
from cluster.settings import PoolSettings
from pipeline.errors import SpecError
from tests.cluster.test_fleet import check, generate, live_groups, status, wait_for
from tests.extra_nodes import ExtraNodes, extra_nodes
from tests.scripted_engine import ScriptedConfig

TYPE = "H100-80G"


@pytest.fixture
def nodes(local_ray: None) -> Iterator[ExtraNodes]:
    with extra_nodes() as added:
        yield added


def planned(num_gpus: int, config: ScriptedConfig, *, most: int | None = None) -> PoolPlan:
    """A pool of replicas of so many GPUs, as the planner shapes it for the nodes that are there."""
    pool = PoolSettings(gpu=TYPE, tensor_parallel=num_gpus)
    shape = slot_shape(pool, num_nodes=nodes_of_replica(pool, seen_hardware(read_nodes())))
    return PoolPlan(TYPE, 1, config, max_num_seqs=config.max_num_seqs, shape=shape, max_replicas=most)


def homes(fleet: object) -> list[list[str]]:
    """Nodes of each replica that is up, its first node first."""
    return [r["nodes"] for pool in status(fleet)["pools"] for r in pool["replicas"] if r["state"] == "up"]


def followers(journal: Path) -> dict[int, str]:
    """Process id to node id of every follower that there has been."""
    return {int(log.stem): log.read_text() for log in journal.glob("*.follower")}


def no_process_is_left(journal: Path) -> bool:
    pids = [*followers(journal), *(int(log.stem) for log in journal.glob("*.log"))]
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.mark.long
def test_a_replica_of_eight_gpus_on_nodes_of_four_is_two_nodes_of_its_type(nodes: ExtraNodes, tmp_path: Path) -> None:
    right = {nodes.add(TYPE, 4) for _ in range(3)}
    nodes.add("L40S", 8)
    pool = planned(8, ScriptedConfig(max_num_seqs=8, journal=str(tmp_path)), most=2)
    check_capacity([pool], read_nodes())
    fleet = start_fleet([pool])
    rows = range(200)
    try:
        wait_for(lambda: status(fleet)["replicas_up"] == 1, "a replica")
        [found] = homes(fleet)
        assert len(set(found)) == 2
        assert set(found) <= right
        assert list(followers(tmp_path).values()) == found[1:]
        [group] = [g for g in placement_group_table().values() if g["state"] == "CREATED" and TYPE in g["name"]]
        assert group["strategy"] == "STRICT_SPREAD"
        assert [bundle["GPU"] for bundle in group["bundles"].values()] == [4, 4]
        fleet.want.remote("run", 100_000)  # a second one finds four GPUs on one node, and isn't begun
        check(asyncio.run(asyncio.wait_for(generate(fleet, rows), 60)), rows)
        assert [len(p["replicas"]) for p in status(fleet)["pools"]] == [1]
        assert ray.available_resources()["GPU"] == 4 + 8
    finally:
        stop_fleet(fleet)
    wait_for(lambda: ray.available_resources().get("GPU") == 12 + 8 and not live_groups(), "everything released", 30)
    wait_for(lambda: no_process_is_left(tmp_path), "no process left", 30)


def test_what_can_not_be_spread_evenly_is_refused(nodes: ExtraNodes) -> None:
    nodes.add(TYPE, 4)
    nodes.add(TYPE, 2)
    check_capacity([planned(4, ScriptedConfig())], read_nodes())
    with pytest.raises(SpecError, match=r"needs 3 GPUs of H100-80G on each of 2 nodes.*equally many") as refused:
        check_capacity([planned(6, ScriptedConfig())], read_nodes())
    assert refused.value.exit_code == 2


@pytest.mark.long
@pytest.mark.parametrize(
    "dies",
    ["second node", *(pytest.param(part, marks=pytest.mark.long) for part in ("first node", "follower", "engine"))],
)
def test_what_dies_anywhere_ends_the_whole_replica_and_the_fleet_replaces_it(
    nodes: ExtraNodes, tmp_path: Path, dies: str
) -> None:
    for _ in range(3):
        nodes.add(TYPE, 4)
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=0.05, journal=str(tmp_path))
    fleet = start_fleet([planned(8, config)], backoff_s=0.1)
    rows = range(600)

    async def disturb() -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, wait_for, lambda: begun(tmp_path) > 50, "work is under way")
        first, second = homes(fleet)[0]
        if dies in ("second node", "first node"):
            await loop.run_in_executor(None, nodes.lose, second if dies == "second node" else first)
        else:
            kill_logged(tmp_path, "follower" if dies == "follower" else "log")

    async def work() -> list[object]:
        outcomes, _ = await asyncio.gather(generate(fleet, rows, shards=4), disturb())
        return list(outcomes)

    try:
        wait_for(lambda: status(fleet)["replicas_up"] == 1, "a replica")
        [before] = homes(fleet)
        outcomes = asyncio.run(asyncio.wait_for(work(), 120))
        check(outcomes, rows)  # type: ignore[arg-type]
        is_node = dies.endswith("node")
        assert [loss["kind"] for loss in status(fleet)["losses"]] == ["node_lost" if is_node else "engine_crash"]
        [after] = homes(fleet)
        assert len(set(after)) == 2
        if is_node:
            assert set(after) != set(before)
        assert len(followers(tmp_path)) == 2
        assert len(list(tmp_path.glob("*.log"))) == 2
    finally:
        stop_fleet(fleet)
    free = 8 if is_node else 12
    wait_for(lambda: ray.available_resources().get("GPU") == free and not live_groups(), "everything released", 30)
    wait_for(lambda: no_process_is_left(tmp_path), "no process left", 30)


def kill_logged(journal: Path, suffix: str) -> None:
    [log] = journal.glob(f"*.{suffix}")
    os.kill(int(log.stem), signal.SIGKILL)


def begun(journal: Path) -> int:
    return sum(len(log.read_text().splitlines()) for log in journal.glob("*.log"))


@pytest.mark.long
def test_a_part_that_can_not_load_is_the_replicas_failed_start(nodes: ExtraNodes) -> None:
    for _ in range(2):
        nodes.add(TYPE, 1)
    fleet = start_fleet([planned(2, ScriptedConfig(fail_follower="no memory on this node"))], backoff_s=0.01)
    try:
        wait_for(lambda: status(fleet)["verdict"] is not None, "a verdict")
        assert "no memory on this node" in status(fleet)["verdict"]
    finally:
        stop_fleet(fleet)
    wait_for(lambda: ray.available_resources().get("GPU") == 2 and not live_groups(), "everything released", 30)
