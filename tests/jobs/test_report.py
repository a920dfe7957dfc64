"""What a command says at its end: the next step is one that works."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.report import next_step


def summary(status: str = "done", *, missing: int = 0, **kinds: int) -> dict[str, Any]:
    return {"status": status, "counts": {"missing_rows": missing, "failed": sum(kinds.values())}, "error_kinds": kinds}


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (summary(), "read out/data/*.parquet; "),
        (summary("interrupted", missing=5), "tramontane run 'my job.yaml' --set sampling.n=2   (continues"),
        (summary("interrupted", missing=5, engine_crash=1), "tramontane run 'my job.yaml'"),
        (summary(engine_crash=1, null_prompt=9), "tramontane retry 'my job.yaml' --set sampling.n=2   (does"),
        (summary(null_prompt=9), "read the column `error` of out/data/*.parquet; these rows would fail again"),
        (summary("too_many_failures", missing=5, null_prompt=9), "read the column `error` of out/data/*.parquet; mend"),
    ],
)
def test_the_next_step_fits_the_outcome(outcome: dict[str, Any], expected: str) -> None:
    assert next_step(outcome, "'my job.yaml' --set sampling.n=2", "out/data/*.parquet").startswith(expected)
