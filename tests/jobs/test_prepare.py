"""What a run finds out before it touches anything: whether it can record routing, and why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.prepare import routing_off_reason
from pipeline.engine import MoeShape
from pipeline.errors import SpecError
from tests.whole_runs import make_job, write_prompts


@pytest.mark.parametrize(
    ("level", "moe", "reason"),
    [
        ("off", MoeShape(4, 8, 2), "routing.level is off"),
        ("counts", None, "LlamaForCausalLM is a dense model: it has no router"),
        ("counts", MoeShape(4, 8, 2), None),
        ("counts", MoeShape(4, 512, 8), None),
        ("tokens", MoeShape(4, 256, 8), None),
    ],
)
def test_a_run_without_routing_says_why(tmp_path: Path, level: str, moe: MoeShape | None, reason: str | None) -> None:
    job = make_job(write_prompts(tmp_path / "in.parquet", 1), tmp_path / "out", routing={"level": level})
    model = replace(job.model, architecture="LlamaForCausalLM", moe=moe)
    assert routing_off_reason(job.spec, model) == reason


def test_ids_that_fit_no_byte_are_refused(tmp_path: Path) -> None:
    job = make_job(write_prompts(tmp_path / "in.parquet", 1), tmp_path / "out", routing={"level": "tokens"})
    with pytest.raises(SpecError, match="there are 300 experts; use counts"):
        routing_off_reason(job.spec, replace(job.model, moe=MoeShape(4, 300, 2)))
