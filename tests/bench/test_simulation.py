"""Many replicas of three speeds under the real dispatch board: no sequence idles while there is work."""

from __future__ import annotations

import pytest

from tests.bench.simulate_fleet import Simulation


@pytest.mark.parametrize(
    ("replicas", "rows"),
    [(20, 20_000), pytest.param(200, 1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(1200)])],
)
def test_replicas_of_three_speeds_are_idle_for_less_than_two_percent(replicas: int, rows: int) -> None:
    figures = Simulation(replicas=replicas, rows=rows, sequences=64).run()
    print(figures)
    assert figures["idle_share_until_the_input_is_dry"] < 0.02
    assert figures["decision_us_per_row"] < 1000  # 10 to 100 on an idle core


def test_the_end_takes_no_longer_than_if_lengths_were_known() -> None:
    """On average: in one run of some the longest row is the last to be begun."""
    runs = [Simulation(replicas=4, rows=8000, sequences=64, num_speeds=4, seed=seed).run() for seed in range(1, 9)]
    ours, by_lengths = (sum(run[name] for run in runs) for name in ("last_tenth_s", "last_tenth_by_lengths_s"))
    print(ours / by_lengths)
    assert ours < 1.1 * by_lengths
    assert all(0 < run["rows_begun_twice"] < 0.03 * run["rows"] for run in runs)
