"""What is refused, or known to be no work, before a run touches its output: from reads alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from jobs.preflight import preflight
from jobs.prepare import PreparedJob
from jobs.summary import SUMMARY, Execution, write_summary
from jobs.work import RunOptions
from pipeline.counters import RunCounters, SampleFacts
from pipeline.errors import SpecError
from pipeline.lease import acquire_lease
from pipeline.ledger import Ledger
from pipeline.parts import commit_part, encode_part
from pipeline.storage import Store
from tests.whole_runs import make_job, snapshot, write_prompts


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("rows") / "in.parquet", 100)


def finish(job: PreparedJob, *, kind: str, summary: bool) -> Store:
    """An output whose two parts are committed, with one failed row in the first."""
    store = Store(job.spec.output.path)
    ledger = Ledger(store)
    ledger.open_run(job.plan, job.fingerprint, resume="if_possible")
    for shard in job.plan:
        counters = RunCounters()
        for row in range(shard.num_rows):
            failed = (shard.index, row) == (0, 3)
            facts = SampleFacts("failed", error_kind=kind) if failed else SampleFacts("ok", 5)
            counters.add_row([facts], num_input_tokens=9, num_cached_tokens=0)
        commit_part(store, shard.part_name, encode_part(pa.table({}), counters.to_json_bytes(), {}))
    if summary:
        write_summary(store, job, ledger.totals(), Execution("abc"), status="done", exit_code=0)
    return store


@pytest.mark.parametrize("summary", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("engine_crash", RunOptions(), True),
        ("null_prompt", RunOptions(), False),
        ("null_prompt", RunOptions(only_failed=True), True),
        ("null_prompt", RunOptions(only_failed=True, kinds=("engine_crash",)), False),
        ("null_prompt", RunOptions(only_failed=True, statuses=("ok",)), True),
        ("null_prompt", RunOptions(only_failed=True, statuses=("truncated",)), False),
        ("engine_crash", RunOptions(retry_failed=False), False),
    ],
)
def test_a_finished_run_has_work_if_rows_are_to_be_done_again(
    tmp_path: Path, rows: Path, kind: str, options: RunOptions, expected: bool, summary: bool
) -> None:
    job = make_job(rows, tmp_path / "out")
    store = finish(job, kind=kind, summary=summary)
    before = snapshot(tmp_path)
    assert preflight(job, options, store) is expected
    assert snapshot(tmp_path) == before


def test_missing_parts_are_work_whatever_the_summary_says(tmp_path: Path, rows: Path) -> None:
    job = make_job(rows, tmp_path / "out")
    store = finish(job, kind="null_prompt", summary=True)
    store.delete(f"data/{job.plan.shard(1).part_name}")
    assert store.read(SUMMARY)
    assert preflight(job, RunOptions(), store)


def test_a_new_output_has_work_unless_there_are_no_rows_and_is_not_made(tmp_path: Path, rows: Path) -> None:
    empty = write_prompts(tmp_path / "empty.parquet", 0)
    before = snapshot(tmp_path)
    for path, expected in ((rows, True), (empty, False)):
        job = make_job(path, tmp_path / "out")
        assert preflight(job, RunOptions(), Store(job.spec.output.path)) is expected
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunOptions(only_failed=True), "holds no run, so there is nothing to retry; use `tramontane run`"),
        (
            RunOptions(only_failed=True, statuses=("failed", "truncated"), kinds=("engine_crash",)),
            "--kind engine_crash chooses among failed rows, but --status truncated has no kinds",
        ),
    ],
)
def test_a_retry_that_makes_no_sense_is_refused(tmp_path: Path, rows: Path, options: RunOptions, message: str) -> None:
    job = make_job(rows, tmp_path / "out")
    with pytest.raises(SpecError, match=message):
        preflight(job, options, Store(job.spec.output.path))
    assert list(tmp_path.iterdir()) == []


def test_files_of_somebody_else_are_refused_before_a_run_is_recorded(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "theirs.parquet").write_bytes(b"theirs")
    job, before = make_job(rows, tmp_path / "out"), snapshot(tmp_path)
    with pytest.raises(SpecError, match=r"no run is recorded there: theirs\.parquet"):
        preflight(job, RunOptions(), Store(job.spec.output.path))
    assert snapshot(tmp_path) == before


def test_an_output_where_nothing_can_be_made_is_a_wrong_spec() -> None:
    with (
        pytest.raises(SpecError, match=r"/proc/tramontane can't be written to: .*; correct output.path"),
        acquire_lease(Store("/proc/tramontane"), run_id="r"),
    ):
        pass


def test_more_tokens_than_the_model_was_made_for_are_refused(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(SpecError, match=r"max_model_len is 40000, but .* was made for 32768 tokens .*; lower"):
        make_job(rows, tmp_path / "out", model={"source": "tiny", "max_model_len": 40_000})


def test_an_output_that_is_no_folder_is_a_wrong_spec(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    job = make_job(rows, tmp_path / "file" / "out")
    with pytest.raises(SpecError, match=r"file/out can't be used: .*; correct output.path or credentials"):
        preflight(job, RunOptions(), Store(job.spec.output.path))
