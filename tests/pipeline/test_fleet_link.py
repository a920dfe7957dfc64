"""A replica hangs when it has work and makes no step for long; one without work may stand still."""

from __future__ import annotations

import pytest

from pipeline.errors import ReplicaHung
from pipeline.fleet_link import Pulse


def test_a_replica_with_work_that_makes_no_step_for_the_timeout_hangs() -> None:
    pulse = Pulse(30.0, now=0.0)
    pulse.feel(5, 29.0, has_work=True)
    pulse.feel(5, 59.0, has_work=True)
    with pytest.raises(ReplicaHung, match="no engine step for 30 s"):
        pulse.feel(5, 59.1, has_work=True)


def test_a_step_or_having_nothing_to_do_is_life_enough() -> None:
    pulse = Pulse(30.0, now=0.0)
    for moment in range(0, 300, 29):
        pulse.feel(moment, float(moment), has_work=True)
    last = pulse
    last.feel(290, 1000.0, has_work=False)
    last.feel(290, 1029.0, has_work=True)
    with pytest.raises(ReplicaHung):
        last.feel(290, 1031.0, has_work=True)
