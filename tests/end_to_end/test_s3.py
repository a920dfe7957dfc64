"""Whole runs with input and output on a real S3 HTTP server: the same guarantees as on local disks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from jobs.status import read_status, status_lines
from pipeline.storage import Store
from tests.driver_processes import Driver, DriverLauncher, wait_until
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, check_whole, make_job, results, run_scripted, spec_text, write_prompts

ENGINES = {"max_num_seqs": 16, "step_delay_s": 0.08}
SAMPLED = {"sampling": {"temperature": 1.0}}


@pytest.fixture
def launcher(tmp_path: Path, s3_server: str) -> Iterator[DriverLauncher]:
    started = DriverLauncher(tmp_path, ENGINES)
    yield started
    started.close()


def upload(folder: Path, bucket: str) -> None:
    """Put the folder's files under `in/`, with boto3 rather than our own storage."""
    client = boto3.client("s3")
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), bucket, f"in/{path.name}")


def write_spec(folder: Path, bucket: str, glob: str) -> Path:
    spec = folder / "job.yaml"
    spec.write_text(spec_text(f"s3://{bucket}/in/{glob}", f"s3://{bucket}/out", **SAMPLED))
    return spec


def by_file_name(found: dict[tuple[str, int, int], Any]) -> dict[tuple[str, int, int], Any]:
    return {(file.rpartition("/")[2], row, sample): values for (file, row, sample), values in found.items()}


def check_against_local(output: str, local: Path, num_rows: int) -> None:
    """The same input on local disks, undisturbed, gives the same rows and statistics."""
    run_scripted(make_job(f"{local}/*", local.parent / "undisturbed", **SAMPLED), ScriptedConfig(moe=TINY_MOE))
    assert by_file_name(results(output)) == by_file_name(results(local.parent / "undisturbed"))
    assert check_whole(output, num_rows) == check_whole(local.parent / "undisturbed", num_rows)


def num_parts(output: str) -> int:
    return len(Store(output).list("data"))


def after_parts(output: str, count: int) -> Callable[[Driver], None]:
    # Not often: the server is a thread of this process, and each look is a request.
    return lambda driver: wait_until(
        lambda: driver.ended or num_parts(output) >= count, f"{count} parts", interval_s=0.3
    )


def test_killed_driver_resumes_on_s3_without_lost_or_duplicate_rows(
    local_ray: None, tmp_path: Path, s3_bucket: str, launcher: DriverLauncher
) -> None:
    local = tmp_path / "in"
    local.mkdir()
    write_prompts(local / "a.parquet", 450)
    write_prompts(local / "b.parquet", 350)
    upload(local, s3_bucket)
    spec, output = write_spec(tmp_path, s3_bucket, "*.parquet"), f"s3://{s3_bucket}/out"
    driver = launcher.start(spec)
    after_parts(output, 3)(driver)
    driver.kill()
    committed = num_parts(output)
    assert 3 <= committed < 14
    report = read_status(output)
    assert report["committed_shards"] == committed
    assert report["summary"] is None
    assert f"pid {driver.pid} ended without a word (killed?)" in status_lines(report)[-1]

    said = launcher.run(spec).said
    assert f"resumes {output}: " in said
    check_against_local(output, local, 800)
    assert read_status(output)["summary"]["counts"]["missing_rows"] == 0


def test_of_two_runs_at_once_on_s3_one_does_the_jsonl_rows_and_the_other_is_told_who(
    local_ray: None, tmp_path: Path, s3_bucket: str, launcher: DriverLauncher
) -> None:
    local = tmp_path / "in"
    local.mkdir()
    for name, rows in (("a.jsonl", 200), ("b.jsonl", 400)):
        lines = [json.dumps({"id": f"{name}-{n}", "text": f"question number {n}"}) for n in range(rows)]
        (local / name).write_text("\n".join(lines) + "\n")
    upload(local, s3_bucket)
    spec, output = write_spec(tmp_path, s3_bucket, "*.jsonl"), f"s3://{s3_bucket}/out"
    drivers = [launcher.start(spec) for _ in range(2)]
    codes = {driver.wait(): driver for driver in drivers}
    assert sorted(codes) == [0, 2], [driver.said for driver in drivers]
    assert f"output {output} is in use by run " in codes[2].said
    assert f"pid {codes[0].pid}, since " in codes[2].said
    check_against_local(output, local, 600)
