"""Whole runs with input and output on a real S3 HTTP server: the same guarantees as on local disks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from jobs.status import read_status, status_lines
from tests.driver_processes import Driver, DriverLauncher
from tests.part_watcher import PartWatcher, part_names, part_versions
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import (
    TINY_MOE,
    check_whole,
    errors,
    make_job,
    results,
    run_scripted,
    spec_text,
    token_of,
    write_prompts,
)

SLOW = {"max_num_seqs": 16, "step_delay_s": 0.08}
LOOK_INTERVAL_S = 0.3
"""Not often: the server is a thread of this process, and each look is a request."""
SHARD_ROWS = 64
SAMPLED = {"sampling": {"temperature": 1.0}}


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


def watcher(output: str, *file_rows: int) -> PartWatcher:
    part_rows = {SHARD_ROWS} | {rows % SHARD_ROWS for rows in file_rows}
    return PartWatcher(output, part_rows=part_rows, interval_s=LOOK_INTERVAL_S)


def after_parts(output: str, count: int) -> Callable[[Driver], None]:
    return lambda driver: driver.until(
        lambda: len(part_names(output)) >= count, f"{count} parts", interval_s=LOOK_INTERVAL_S
    )


@pytest.mark.long  # tests/faults/test_commit_crashes.py has the sample: runs killed between two steps of a commit on S3
def test_killed_driver_resumes_on_s3_without_lost_or_duplicate_rows(
    local_ray: None, tmp_path: Path, s3_bucket: str, new_launcher: Callable[..., DriverLauncher]
) -> None:
    local = tmp_path / "in"
    local.mkdir()
    write_prompts(local / "a.parquet", 300)
    write_prompts(local / "b.parquet", 230)
    upload(local, s3_bucket)
    spec, output = write_spec(tmp_path, s3_bucket, "*.parquet"), f"s3://{s3_bucket}/out"
    launcher = new_launcher(**SLOW)
    with watcher(output, 300, 230) as reader:
        driver = launcher.start(spec)
        after_parts(output, 3)(driver)
        driver.kill()
        committed = len(part_names(output))
        assert 3 <= committed < 9
        report = read_status(output)
        # A writer outlives its driver by a moment, and may commit what it holds.
        assert committed <= report["committed_shards"] <= len(part_names(output))
        assert report["summary"] is None
        assert f"pid {driver.pid} ended without a word (killed?)" in status_lines(report)[-1]

        said = launcher.run(spec).said
    assert reader.problems == []
    assert reader.num_reads >= 9
    assert f"resumes {output}: " in said
    check_against_local(output, local, 530)
    assert read_status(output)["summary"]["counts"]["missing_rows"] == 0


@pytest.mark.long
def test_of_two_runs_at_once_on_s3_one_does_the_jsonl_rows_and_the_other_is_told_who(
    local_ray: None, tmp_path: Path, s3_bucket: str, new_launcher: Callable[..., DriverLauncher]
) -> None:
    local = tmp_path / "in"
    local.mkdir()
    for name, rows in (("a.jsonl", 200), ("b.jsonl", 400)):
        lines = [json.dumps({"id": f"{name}-{n}", "text": f"question number {n}"}) for n in range(rows)]
        (local / name).write_text("\n".join(lines) + "\n")
    upload(local, s3_bucket)
    spec, output = write_spec(tmp_path, s3_bucket, "*.jsonl"), f"s3://{s3_bucket}/out"
    launcher = new_launcher(**SLOW)
    drivers = [launcher.start(spec) for _ in range(2)]
    codes = {driver.wait(): driver for driver in drivers}
    assert sorted(codes) == [0, 2], [driver.said for driver in drivers]
    assert f"output {output} is in use by run " in codes[2].said
    assert f"pid {codes[0].pid}, since " in codes[2].said
    check_against_local(output, local, 600)


@pytest.mark.long
def test_retry_on_s3_does_failed_rows_again_and_replaces_just_their_parts(
    local_ray: None, tmp_path: Path, s3_bucket: str, new_launcher: Callable[..., DriverLauncher]
) -> None:
    local = tmp_path / "in"
    local.mkdir()
    text = [f"please explode {n}" if n in (3, 5, 70) else f"question number {n}" for n in range(200)]
    write_prompts(local / "a.parquet", 200, text=text)
    upload(local, s3_bucket)
    spec, output = write_spec(tmp_path, s3_bucket, "*.parquet"), f"s3://{s3_bucket}/out"
    with watcher(output, 200) as reader:
        new_launcher(faults={token_of("explode"): "error"}).run(spec)
        assert {row: kind for row, (kind, _) in errors(output).items()} == dict.fromkeys((3, 5, 70), "request_error")
        before = part_versions(output)
        new_launcher().run(spec, command="retry")
    assert reader.problems == []
    after = part_versions(output)
    changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    assert changed == sorted(before)[:2]
    assert reader.num_reads >= len(before) + len(changed)
    check_against_local(output, local, 200)
