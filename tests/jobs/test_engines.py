"""Engines that are kept over several runs: the same for those that want the same, while they are sound."""

from __future__ import annotations

import pytest
import ray

from cluster.pools import PoolPlan
from jobs.engines import Engines, KeptEngines, kept_engines
from jobs.interrupts import Interrupts
from tests.driver_processes import wait_until
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE


def scripted_engines(**settings: int) -> Engines:
    config = ScriptedConfig(moe=TINY_MOE, **settings)
    return Engines(pools=[PoolPlan("scripted", 1, config, max_num_seqs=config.max_num_seqs)])


def live_fleet(kept: KeptEngines, wanted: Engines) -> ray.actor.ActorHandle:
    kept.find(wanted, Interrupts(), say=print)
    fleet, pools = kept.live(60.0)
    assert pools == wanted.pools
    return fleet


def is_live(fleet: ray.actor.ActorHandle) -> bool:
    try:
        ray.get(fleet.status.remote(), timeout=10)
    except ray.exceptions.RayActorError:
        return False
    return True


@pytest.mark.usefixtures("local_ray")
def test_a_fleet_is_kept_for_runs_that_want_it_and_replaced_when_it_is_lost() -> None:
    with kept_engines() as kept:
        first = live_fleet(kept, scripted_engines())
        assert live_fleet(kept, scripted_engines()) == first
        ray.kill(first)
        wait_until(lambda: not is_live(first), "the fleet is gone")
        second = live_fleet(kept, scripted_engines())
        assert is_live(second)
        other = live_fleet(kept, scripted_engines(max_num_seqs=3))
        assert is_live(other)
        wait_until(lambda: not is_live(second), "the one before is stopped")
    wait_until(lambda: not is_live(other), "the last one is stopped")
