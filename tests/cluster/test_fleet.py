"""A fleet over several nodes: real Ray nodes with GPU type labels and logical GPUs, real actors, scripted engines."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.core.generated import autoscaler_pb2
from ray.util import placement_group_table

from cluster.fleet import start_fleet, stop_fleet
from cluster.pools import PoolPlan, SlotShape
from jobs.run import RunOptions, run_job
from pipeline.dispatcher import Dispatcher
from pipeline.engine import Request
from pipeline.errors import InfrastructureError
from pipeline.outcomes import Outcome
from pipeline.settings import SamplingSettings
from tests.extra_nodes import ExtraNodes, extra_nodes
from tests.scripted_engine import ScriptedConfig, complete
from tests.whole_runs import TINY_MOE, check_whole, make_job, write_prompts

SAMPLING = SamplingSettings(temperature=0, max_tokens=8)


@pytest.fixture
def nodes(local_ray: None) -> Iterator[ExtraNodes]:
    with extra_nodes() as added:
        yield added


def shape(gpu_type: str, num_gpus: int) -> SlotShape:
    return SlotShape(num_gpus=num_gpus, gpu_type=gpu_type, gpu_labels=(gpu_type,))


def requests_for(rows: range) -> list[Request | None]:
    return [Request("", [1, 1000 + row], SAMPLING, None) for row in rows]


def expected_text(row: int) -> str:
    return complete(Request("", [1, 1000 + row], SAMPLING, None), ScriptedConfig()).samples[0].text


async def generate(fleet: Any, rows: range, *, shards: int = 1) -> list[Outcome | None]:
    """All rows' outcomes, in order, by a dispatcher of its own."""
    dispatcher = Dispatcher(fleet, max_attempts=3, hang_timeout_s=30.0, on_outcome=lambda request, outcome: None)
    size = len(rows) // shards
    parts = [dispatcher.generate(requests_for(rows[start : start + size])) for start in range(0, len(rows), size)]
    done = await asyncio.gather(*parts)
    return [outcome for part in done if part is not None for outcome in part]


def check(outcomes: list[Outcome | None], rows: range, *, failed: dict[int, str] | None = None) -> None:
    assert len(outcomes) == len(rows)
    for row, outcome in zip(rows, outcomes, strict=True):
        assert outcome is not None
        if outcome.result.failure is None:
            assert outcome.result.samples[0].text == expected_text(row)
        else:
            assert (failed or {}).get(row) == outcome.result.failure.kind


def status(fleet: Any) -> dict[str, Any]:
    return dict(ray.get(fleet.status.remote()))


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = 180.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.05)
    return time.monotonic() - began


def num_begun(journal: Path) -> int:
    """Requests that engines have begun, those of killed ones too."""
    return sum(len(log.read_text().splitlines()) for log in journal.glob("*.log"))


def live_groups() -> list[str]:
    """Slots of this module's pools; other tests may share a fleet in the same Ray."""
    ours = ("A100-80G", "H100-80G", "L40S", "L4")
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return [g["name"] for g in groups if g["name"].removeprefix("tramontane//").startswith(ours)]


def test_one_job_feeds_three_gpu_types_with_two_tensor_parallel_sizes(nodes: ExtraNodes, tmp_path: Path) -> None:
    a100 = {nodes.add("A100-80G", 2), nodes.add("A100-80G", 2)}
    h100, l40s = nodes.add("H100-80G", 4), nodes.add("L40S", 4)
    finishes = tmp_path / "finishes"
    finishes.mkdir()

    def pool(name: str, replicas: int, gpus: int, step_s: float) -> PoolPlan:
        config = ScriptedConfig(max_num_seqs=16, step_delay_s=step_s, moe=TINY_MOE, finishes=str(finishes))
        return PoolPlan(name, replicas, config, max_num_seqs=16, shape=shape(name, gpus))

    slow, fast = 1.2, 0.4  # of which a busy machine's own work is little
    pools = [pool("A100-80G", 2, 2, slow), pool("H100-80G", 2, 2, fast), pool("L40S", 1, 4, slow)]
    fleet = start_fleet(pools)
    try:
        wait_for(lambda: status(fleet)["replicas_up"] == 5, "five replicas")
        placed = {r["replica"]: r["nodes"] for p in status(fleet)["pools"] for r in p["replicas"]}
        assert {node for name, found in placed.items() if name.startswith("A100") for node in found} == a100
        assert [found for name, found in placed.items() if name.startswith("H100")] == [[h100], [h100]]
        assert [found for name, found in placed.items() if name.startswith("L40S")] == [[l40s]]
        assert ray.available_resources().get("GPU", 0) == 0

        job = make_job(write_prompts(tmp_path / "in.parquet", 1600), tmp_path / "out")
        assert run_job(job, RunOptions(quiet=True), say=[].append, pools=pools, fleet=fleet)["exit_code"] == 0
        check_whole(tmp_path / "out", 1600)
        done: dict[str, list[float]] = {}
        last = []
        for log in finishes.glob("*.times"):
            times = [float(line) for line in log.read_text().split()]
            done.setdefault(log.with_suffix(".node").read_text(), []).append(len(times))
            last.append(max(times))
        print({name: (placed, done.get(found[0])) for name, found in placed.items()}, last)
        print(f"rows by node and replica {done}, last rows {[each - max(last) for each in last]} s")
        assert sum(map(sum, done.values())) == 1600
        per_slow = (sum(done[l40s]) + sum(sum(done[node]) for node in a100)) / 3
        assert 2.4 <= sum(done[h100]) / 2 / per_slow <= 3.6
        # A microbatch of 8 to 32 rows is one or two steps of 16 rows on the slowest.
        assert max(last) - min(last) <= 2 * slow + 0.4
    finally:
        stop_fleet(fleet)
    wait_for(lambda: ray.available_resources().get("GPU", 0) == 12 and not live_groups(), "everything released", 30)


@pytest.mark.long
def test_work_starts_with_the_first_replica(nodes: ExtraNodes, tmp_path: Path) -> None:
    """One pool's model loads for ten minutes; the other's replica does every row meanwhile."""
    nodes.add("H100-80G", 1)
    nodes.add("L4", 1)
    quick = ScriptedConfig(moe=TINY_MOE, max_num_seqs=16, step_delay_s=0.05, journal=str(tmp_path))
    loading = ScriptedConfig(moe=TINY_MOE, max_num_seqs=16, start_delay_s=600.0, journal=str(tmp_path))
    pools = [
        PoolPlan("H100-80G", 1, loading, max_num_seqs=16, shape=shape("H100-80G", 1)),
        PoolPlan("L4", 1, quick, max_num_seqs=16, shape=shape("L4", 1)),
    ]
    job = make_job(write_prompts(tmp_path / "in.parquet", 500), tmp_path / "out")
    began = time.monotonic()
    assert run_job(job, RunOptions(quiet=True), say=[].append, pools=pools)["exit_code"] == 0
    assert time.monotonic() - began < 200
    check_whole(tmp_path / "out", 500)
    assert [num_begun_by(log) for log in tmp_path.glob("*.log")] == [500]


def num_begun_by(log: Path) -> int:
    return len(log.read_text().splitlines())


@pytest.mark.long  # tests/cluster/test_campaign.py has a sample
def test_lost_nodes_and_replicas_are_replaced_and_no_row_is_lost_or_blamed(nodes: ExtraNodes, tmp_path: Path) -> None:
    first = nodes.add("L4", 2)
    nodes.add("L4", 1)
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=0.05, journal=str(tmp_path))
    pool = PoolPlan("L4", 1, config, max_num_seqs=8, shape=shape("L4", 1), max_replicas=10)
    fleet = start_fleet([pool], backoff_s=0.1)
    rows = range(4000)

    def logs() -> set[Path]:
        return set(tmp_path.glob("*.log"))

    async def disturb() -> float:
        """Lose a node with two replicas, add one with two, kill the process of one; returns how long joining took."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(3)
        await loop.run_in_executor(None, nodes.lose, first)
        await asyncio.sleep(1)
        started = logs()
        await loop.run_in_executor(None, nodes.add, "L4", 2)
        began = time.monotonic()
        while not any(log.stat().st_size for log in logs() - started):
            await asyncio.sleep(0.05)
            assert time.monotonic() - began < 30
        joined_s = time.monotonic() - began
        new = next(iter(logs() - started))
        os.kill(int(new.stem), signal.SIGKILL)
        return joined_s

    async def work() -> tuple[list[Outcome | None], float]:
        fleet.want.remote("run", 100_000)
        outcomes, joined_s = await asyncio.gather(generate(fleet, rows, shards=8), disturb())
        return outcomes, joined_s

    try:
        wait_for(lambda: status(fleet)["replicas_up"] == 3, "three replicas")
        outcomes, joined_s = asyncio.run(asyncio.wait_for(work(), 120))
        check(outcomes, rows)
        assert joined_s < 10
        kinds = [loss["kind"] for loss in status(fleet)["losses"]]
        assert sorted(kinds) == ["engine_crash", "node_lost", "node_lost"]
        # A lost node is nobody's fault: only the killed process's rows may have been charged with an attempt.
        charged = sum(outcome is not None and outcome.attempts > 1 for outcome in outcomes)
        assert charged <= 2 * 8
    finally:
        stop_fleet(fleet)


def test_a_poison_row_is_found_and_the_fleet_is_whole_again(nodes: ExtraNodes) -> None:
    nodes.add("L4", 3)
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=0.02, faults={1037: "crash"})
    fleet = start_fleet([PoolPlan("L4", 3, config, max_num_seqs=8, shape=shape("L4", 1))], backoff_s=0.1)
    rows = range(600)
    try:
        outcomes = asyncio.run(asyncio.wait_for(generate(fleet, rows), 120))
        check(outcomes, rows, failed={37: "engine_crash"})
        assert outcomes[37] is not None
        assert outcomes[37].attempts == 3
        wait_for(lambda: status(fleet)["replicas_up"] == 3, "the fleet whole again")
    finally:
        stop_fleet(fleet)


@pytest.mark.long
def test_a_replica_drains_when_there_is_no_work_for_it(nodes: ExtraNodes, tmp_path: Path) -> None:
    nodes.add("L4", 3)
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=3.0, steps_per_request=5, journal=str(tmp_path))
    pool = PoolPlan("L4", 0, config, max_num_seqs=8, shape=shape("L4", 1), max_replicas=3)
    fleet = start_fleet([pool])
    try:
        fleet.want.remote("run", 20)  # one replica holds 16
        wait_for(lambda: status(fleet)["replicas_up"] == 2, "a replica for every 16 rows")

        async def work() -> list[Outcome | None]:
            generating = asyncio.ensure_future(generate(fleet, range(16)))
            await asyncio.sleep(1)
            fleet.want.remote("run", 5)
            return await generating

        check(asyncio.run(asyncio.wait_for(work(), 90)), range(16))  # 15 s: one drains meanwhile
        assert num_begun(tmp_path) == 16
        wait_for(lambda: status(fleet)["replicas_up"] == 1, "one too many has gone", 30)
        fleet.want.remote("run", 0)
        wait_for(lambda: status(fleet)["replicas_up"] == 0, "all have gone", 40)
        assert status(fleet)["num_losses"] == 0
        wait_for(lambda: ray.available_resources().get("GPU", 0) == 3, "GPUs free", 10)
    finally:
        stop_fleet(fleet)


@pytest.mark.long
def test_a_node_that_is_about_to_go_is_left_in_time_and_no_row_is_begun_twice(
    nodes: ExtraNodes, tmp_path: Path
) -> None:
    leaving = nodes.add("L4", 2)
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=0.5, steps_per_request=2, journal=str(tmp_path))
    fleet = start_fleet([PoolPlan("L4", 1, config, max_num_seqs=8, shape=shape("L4", 1), max_replicas=4)])
    rows = range(240)

    async def take_away() -> None:
        await asyncio.sleep(1)
        await asyncio.get_running_loop().run_in_executor(None, nodes.add, "L4", 2)
        announce_end(leaving, seconds_left=20)

    async def work() -> list[Outcome | None]:
        fleet.want.remote("run", 100_000)
        outcomes, _ = await asyncio.gather(generate(fleet, rows, shards=4), take_away())
        return outcomes

    try:
        wait_for(lambda: status(fleet)["replicas_up"] == 2, "two replicas")
        outcomes = asyncio.run(asyncio.wait_for(work(), 120))
        check(outcomes, rows)
        assert num_begun(tmp_path) == len(rows)
        assert status(fleet)["num_losses"] == 0
        homes = {node for pool in status(fleet)["pools"] for r in pool["replicas"] for node in r["nodes"]}
        assert leaving not in homes
        assert len(homes) == 1
    finally:
        stop_fleet(fleet)


def announce_end(node_id: str, *, seconds_left: float) -> None:
    """What a cloud's preemption notice leads to."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    deadline_ms = int((time.time() + seconds_left) * 1000)
    preemption = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, reason = client.drain_node(node_id, preemption, "test", deadline_ms)
    assert accepted, reason


@pytest.mark.long
def test_an_idle_fleet_is_not_given_up_and_a_verdict_ends_when_a_replica_comes(nodes: ExtraNodes) -> None:
    pool = PoolPlan("L4", 0, ScriptedConfig(), shape=shape("L4", 1), max_replicas=1)
    fleet = start_fleet([pool], start_timeout_s=2.0)
    try:
        fleet.want.remote("run", 0)
        time.sleep(4)
        assert status(fleet)["verdict"] is None
        urgent = PoolPlan("L4", 1, ScriptedConfig(), shape=shape("L4", 1))
        stranded = start_fleet([urgent], start_timeout_s=1.0)
        wait_for(lambda: status(stranded)["verdict"] is not None, "a verdict")
        nodes.add("L4", 1)
        wait_for(lambda: status(stranded)["verdict"] is None, "the verdict is lifted", 30)
        assert status(stranded)["replicas_up"] == 1
        stop_fleet(stranded)
    finally:
        stop_fleet(fleet)


def test_what_cannot_be_placed_gives_up_at_the_deadline_and_says_what_it_waits_for(nodes: ExtraNodes) -> None:
    nodes.add("L4", 1)
    pool = PoolPlan("H100-80G", 1, ScriptedConfig(), shape=shape("H100-80G", 2))
    fleet = start_fleet([pool], start_timeout_s=2.0)
    try:
        with pytest.raises(InfrastructureError, match="waits for 2 GPUs of H100-80G on one node"):
            asyncio.run(asyncio.wait_for(generate(fleet, range(4)), 60))
        assert status(fleet)["verdict_exit_code"] == 3
    finally:
        stop_fleet(fleet)
    assert not live_groups()
