"""Engines on the driver's node leave it a CPU: without one, rows are neither read nor templated nor written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray

from cluster.fleet import start_fleet, stop_fleet
from cluster.pools import UNBOUNDED, PoolPlan, SlotShape
from cluster.warm import claim_cpu
from jobs.run import RunOptions, run_job
from pipeline.errors import SpecError
from tests.driver_processes import wait_until
from tests.extra_nodes import extra_nodes
from tests.own_ray import NUM_CPUS
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, check_whole, make_job, write_prompts


def cpu_pool(num_cpus: int, fewest: int, most: int | None = None) -> PoolPlan:
    shape = SlotShape(num_cpus=num_cpus)
    return PoolPlan("cpu", fewest, ScriptedConfig(moe=TINY_MOE), max_num_seqs=8, shape=shape, max_replicas=most)


@pytest.mark.long
@pytest.mark.parametrize(("fewest", "most"), [(2, None), (1, UNBOUNDED)])
def test_replicas_that_would_take_the_drivers_last_cpu_go_elsewhere(
    local_ray: None, fewest: int, most: int | None
) -> None:
    here = ray.get_runtime_context().get_node_id()
    with extra_nodes() as nodes:
        other = nodes.add("none", 0, num_cpus=NUM_CPUS // 2)
        fleet = start_fleet([cpu_pool(NUM_CPUS // 2, fewest, most)])
        try:
            fleet.want.remote("run", 100_000)
            wait_until(lambda: ray.get(fleet.status.remote())["replicas_up"] == 2, "two replicas")
            time.sleep(2)  # four more looks at the cluster
            [pool] = ray.get(fleet.status.remote())["pools"]
            assert sorted(r["nodes"] for r in pool["replicas"]) == sorted([[here], [other]])
            claim_cpu(fleet, "nightly", node_id=here)
            with pytest.raises(SpecError, match=r"'nightly' hold 4 of the 4 CPUs of this node.*such as the head"):
                claim_cpu(fleet, "nightly", node_id=other)
        finally:
            stop_fleet(fleet)


@pytest.mark.long
def test_a_run_with_as_many_cpu_engines_as_there_is_room_for_gets_its_rows_read(
    local_ray: None, tmp_path: Path
) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 2000)
    job = make_job(rows, tmp_path / "out")
    summary = run_job(job, RunOptions(quiet=True), say=[].append, pools=[cpu_pool(2, 1, UNBOUNDED)])
    assert summary["exit_code"] == 0
    check_whole(tmp_path / "out", 2000)
