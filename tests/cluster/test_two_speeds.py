"""A whole run on a slow and a fast pool: what the slow one still works on at the end, the fast one does too."""

from __future__ import annotations

from pathlib import Path

from cluster.pools import PoolPlan
from jobs.run import RunOptions, run_job
from pipeline.chat_encoder import MixtralV1Encoder
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, check_whole, make_job, write_prompts

ROWS = 480
SEQUENCES = 4


def test_rows_of_the_slow_replica_are_begun_again_at_the_end_and_come_out_once(local_ray: None, tmp_path: Path) -> None:
    """The slow one never ends a row of the second half, so the run has no end but by the fast one."""
    journals = {name: tmp_path / name for name in ("slow", "fast")}
    for journal in journals.values():
        journal.mkdir()
    last = MixtralV1Encoder().encode_text("at last").ids[-1]
    text = [f"question number {n}{', at last' if n >= ROWS // 2 else ''}" for n in range(ROWS)]
    pools = [_pool("slow", journals["slow"], took_s=9.0, faults={last: "never"}), _pool("fast", journals["fast"])]
    prompts = write_prompts(tmp_path / "prompts.parquet", ROWS, text=text)
    job = make_job(prompts, tmp_path / "out", limits={"request_timeout_s": 60})
    summary = run_job(job, RunOptions(quiet=True), say=[].append, pools=pools)
    assert summary["exit_code"] == 0
    assert summary["this_execution"]["replica_losses"] == []
    check_whole(tmp_path / "out", ROWS)
    begun = {name: _begun(journal) for name, journal in journals.items()}
    again = set(begun["slow"]) & set(begun["fast"])
    assert 0 < len(again) <= SEQUENCES
    assert len(set(begun["slow"]) | set(begun["fast"])) == ROWS
    assert len(begun["fast"]) == len(set(begun["fast"]))  # the slow one says at each step that it begins


def _begun(journal: Path) -> list[str]:
    return [line for log in journal.glob("*.log") for line in log.read_text().splitlines()]


def _pool(name: str, journal: Path, *, took_s: float = 0.1, faults: dict[int, str] | None = None) -> PoolPlan:
    config = ScriptedConfig(
        max_num_seqs=SEQUENCES,
        step_delay_s=0.1,
        took_s=took_s,
        faults=faults or {},
        moe=TINY_MOE,
        journal=str(journal),
    )
    return PoolPlan(name, 1, config, max_num_seqs=SEQUENCES)
