"""What stops an execution before it can do harm: a lost output, and GPUs that aren't there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.fleet import PoolPlan
from jobs.run import require_gpus
from pipeline.datasink import PartSink
from pipeline.errors import InfrastructureError, SpecError
from pipeline.lease import acquire_lease
from pipeline.storage import Store
from tests.scripted_engine import ScriptedConfig


def test_a_driver_that_was_replaced_commits_nothing_more(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = acquire_lease(store, run_id="first")
    sink = PartSink(store, None, None, fingerprint="f", epoch=first.epoch, retried_statuses=None)
    sink._check_ownership()
    first.release()
    with acquire_lease(store, run_id="second"), pytest.raises(InfrastructureError, match=r"taken over by run second"):
        sink._check_ownership()


def test_gpus_that_are_not_there_are_refused_before_anything_waits_for_them(local_ray: None) -> None:
    require_gpus([PoolPlan("cpu-0", 2, ScriptedConfig())])
    with pytest.raises(SpecError, match=r"H100-80G-0.*need 4 GPUs, but this machine has 0"):
        require_gpus([PoolPlan("H100-80G-0", 2, ScriptedConfig(), num_gpus=2)])
