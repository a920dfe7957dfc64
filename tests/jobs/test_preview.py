"""What `preview` picks and shows; that it answers through the real path is tested with the README's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.preview import pick_rows, preview_lines, run_preview
from pipeline.errors import SpecError
from tests.whole_runs import make_job, write_prompts


@pytest.mark.parametrize("wanted", [1, 7, 100, 5000])
def test_rows_are_spread_over_all_files(wanted: int, tmp_path: Path) -> None:
    for name, rows in (("a", 700), ("b", 0), ("c", 300)):
        write_prompts(tmp_path / f"{name}.parquet", rows)
    job = make_job(f"{tmp_path}/*.parquet", tmp_path / "out")
    picked = [(job.plan.shard(index).file_index, row) for index, rows in pick_rows(job, wanted).items() for row in rows]
    assert len(set(picked)) == min(wanted, 1000)
    if wanted >= 7:
        from_first = sum(job.plan.files[file].path.endswith("a.parquet") for file, _ in picked)
        assert from_first == pytest.approx(0.7 * len(picked), abs=1)


def test_an_input_without_rows_has_no_preview(tmp_path: Path) -> None:
    job = make_job(write_prompts(tmp_path / "in.parquet", 0), tmp_path / "out")
    with pytest.raises(SpecError, match=r"in\.parquet' has no rows; there is nothing to preview"):
        run_preview(job, num_rows=3, say=lambda line: None)


def test_failures_and_repairs_are_shown_beside_the_prompt() -> None:
    def row(number: int, repairs: list[str], *samples: dict[str, Any]) -> dict[str, Any]:
        known = {"input_file": "in.parquet", "input_row": number, "num_input_tokens": 9, "prompt": "<s>[INST]\n hi"}
        return {**known, "repairs": repairs, "samples": list(samples)}

    good = {"status": "ok", "generated_text": "x" * 1000, "num_generated_tokens": 3, "error": None}
    error = {"kind": "null_prompt", "message": "why"}
    bad = {"status": "failed", "generated_text": None, "num_generated_tokens": None, "error": error}
    report = {"rows": [row(0, ["system_folded"], good, good), row(1, [], bad)], "rates": {}}
    assert preview_lines(report) == [
        "--- in.parquet row 0",
        "prompt (9 tokens): <s>[INST] hi",
        "repairs: system_folded",
        f"ok (3 tokens): {'x' * 600}...",
        f"ok (3 tokens): {'x' * 600}...",
        "--- in.parquet row 1",
        "prompt (9 tokens): <s>[INST] hi",
        "failed (0 tokens): null_prompt: why",
    ]
