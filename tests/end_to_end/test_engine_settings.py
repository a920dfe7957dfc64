"""Engine settings that vLLM refuses end the run as a wrong spec, at the first replica's first attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.run import RunOptions, run_job
from pipeline.errors import RunError
from tests.whole_runs import make_job, write_prompts


def run_with(tmp_path: Path, **model: Any) -> RunError:
    rows = write_prompts(tmp_path / "in.parquet", 5)
    job = make_job(rows, tmp_path / "out", model=model)
    with pytest.raises(RunError) as caught:
        run_job(job, RunOptions(quiet=True), say=lambda line: None)
    return caught.value


@pytest.mark.long  # `validate` finds it where vLLM is installed; an engine is started for it where it isn't
@pytest.mark.timeout(600)
def test_an_unknown_engine_argument_is_exit_2_and_names_the_closest(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.spec_rules.known_arguments", lambda: None)  # as on a machine without vLLM
    error = run_with(tmp_path, engine_args={"gpu_memory_utilisation": 0.9})
    assert error.exit_code == 2
    assert "`gpu_memory_utilisation` is not an engine argument" in str(error)
    assert "did you mean `gpu_memory_utilization`?" in str(error)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_value_that_vllm_refuses_is_exit_2_with_its_words(local_ray: None, tmp_path: Path) -> None:
    error = run_with(tmp_path, engine_args={"block_size": -5})
    assert error.exit_code == 2
    assert "vLLM refuses these settings" in str(error)
