"""A whole run on a slow and a fast pool: what the slow one still works on at the end, the fast one does too."""

from __future__ import annotations

from pathlib import Path

from cluster.pools import PoolPlan
from jobs.run import RunOptions, run_job
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, check_whole, make_job, write_prompts

ROWS = 480
SEQUENCES = 4


def test_rows_of_the_slow_replica_are_begun_again_at_the_end_and_come_out_once(local_ray: None, tmp_path: Path) -> None:
    """Four rows take the slow one 4 s, the fast one 0.05 s: 6 s for all, when the slow one is at its second four."""
    journals = {name: tmp_path / name for name in ("slow", "fast")}
    for journal in journals.values():
        journal.mkdir()
    pools = [
        _pool("slow", journals["slow"], steps=8, delay_s=0.5, took_s=4.0),
        _pool("fast", journals["fast"], steps=1, delay_s=0.05, took_s=0.05),
    ]
    job = make_job(write_prompts(tmp_path / "prompts.parquet", ROWS), tmp_path / "out")
    summary = run_job(job, RunOptions(quiet=True), say=[].append, pools=pools)
    assert summary["exit_code"] == 0
    assert summary["this_execution"]["replica_losses"] == []
    check_whole(tmp_path / "out", ROWS)
    begun = {name: _begun(journal) for name, journal in journals.items()}
    again = set(begun["slow"]) & set(begun["fast"])
    assert 0 < len(again) <= SEQUENCES
    assert len(begun["slow"]) + len(begun["fast"]) == ROWS + len(again)


def _begun(journal: Path) -> list[str]:
    return [line for log in journal.glob("*.log") for line in log.read_text().splitlines()]


def _pool(name: str, journal: Path, *, steps: int, delay_s: float, took_s: float) -> PoolPlan:
    config = ScriptedConfig(
        max_num_seqs=SEQUENCES,
        steps_per_request=steps,
        step_delay_s=delay_s,
        took_s=took_s,
        moe=TINY_MOE,
        journal=str(journal),
    )
    return PoolPlan(name, 1, config, max_num_seqs=SEQUENCES)
