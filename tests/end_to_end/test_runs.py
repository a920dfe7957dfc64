"""Whole runs with scripted engines: what goes in comes out, whatever the rows and the engines do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError, SpecError
from pipeline.storage import Store
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import (
    TINY_MOE,
    check_whole,
    errors,
    make_job,
    read_output,
    results,
    run_scripted,
    token_of,
    write_prompts,
)

pytestmark = pytest.mark.usefixtures("local_ray")


def test_every_row_comes_out_once_and_the_numbers_agree(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 300, lang=["en", "fr", None] * 100)
    job = make_job(rows, tmp_path / "out", routing={"slice_by": "lang"})
    summary = run_scripted(job, replicas=2)
    assert (summary["status"], summary["exit_code"]) == ("done", 0)
    totals = check_whole(tmp_path / "out", 300)
    table = read_output(tmp_path / "out")
    assert table["id"].to_pylist() == [f"row-{n}" for n in range(300)]
    experts = pq.read_table(tmp_path / "out" / "routing" / "experts.parquet")
    counts = table["routing"].combine_chunks()
    in_rows = sum(
        sum(counts.field(name).flatten().to_pylist()) for name in ("prompt_expert_counts", "completion_expert_counts")
    )
    assert sum(experts["selections"].to_pylist()) == in_rows
    assert set(experts["slice"].to_pylist()) == {"en", "fr", "(null)"}
    assert set(totals.slices()) == {"en", "fr", "(null)"}
    assert json.loads((tmp_path / "out" / "_run" / "spec.json").read_text()) == job.spec.model_dump(mode="json")


def test_the_summary_is_written_last_and_is_not_there_while_there_is_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 100, text=[None, *["hello"] * 99])
    job = make_job(rows, tmp_path / "out")
    written: list[str] = []
    put = Store.put

    def put_and_note(store: Store, name: str, data: bytes) -> None:
        put(store, name, data)
        written.append(name)

    monkeypatch.setattr(Store, "put", put_and_note)
    run_scripted(job)
    assert [name for name in written if not name.startswith("_run/")][-1] == "summary.json"
    assert {"routing/experts.parquet", "routing/layers.parquet", "README.md"} < set(written)

    def fail(*arguments: Any, **more: Any) -> None:
        assert not (tmp_path / "out" / "summary.json").exists()
        raise InfrastructureError("the fleet is gone")

    monkeypatch.setattr("jobs.run.execute_work", fail)
    with pytest.raises(InfrastructureError, match="the fleet is gone"):
        run_scripted(job, only_failed=True, kinds=("null_prompt",))
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_second_run_finds_nothing_to_do_and_touches_nothing(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 100)
    run_scripted(make_job(rows, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    summary = (tmp_path / "out" / "summary.json").read_bytes()
    said: list[str] = []
    again = run_scripted(make_job(rows, tmp_path / "out"), said=said)
    assert again["exit_code"] == 0
    assert said == [f"nothing to do: all 100 of 100 rows are committed in {tmp_path / 'out'}"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before
    assert (tmp_path / "out" / "summary.json").read_bytes() == summary


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_input_larger_than_rays_memory_streams_through(tmp_path: Path) -> None:
    """600 MB that don't compress, with an object store of 256 MiB; every byte comes out beside its row."""
    num_files, rows_each, size = 8, 2500, 30_000
    for number in range(num_files):
        noise = np.random.default_rng(number).bytes(rows_each * size)
        rows = [noise[start : start + size] for start in range(0, len(noise), size)]
        text = [f"question number {n}" for n in range(rows_each)]
        pq.write_table(pa.table({"text": text, "noise": rows}), tmp_path / f"in-{number}.parquet", compression="none")
    summary = run_scripted(make_job(tmp_path / "in-*.parquet", tmp_path / "out"))
    assert summary["counts"]["input_rows"] == num_files * rows_each
    check_whole(tmp_path / "out", num_files * rows_each)
    for number in range(num_files):
        wanted = pq.read_table(tmp_path / f"in-{number}.parquet", columns=["noise"])["noise"]
        parts = ds.dataset(tmp_path / "out" / "data").filter(
            ds.field("input_file") == str(tmp_path / f"in-{number}.parquet")
        )
        found = parts.to_table(columns=["input_row", "noise"]).sort_by("input_row")["noise"]
        assert found.equals(wanted.cast(found.type))


def test_no_rows_is_a_legal_run(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 0)
    summary = run_scripted(make_job(rows, tmp_path / "out"))
    assert (summary["status"], summary["exit_code"], summary["counts"]["input_rows"]) == ("done", 0, 0)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["counts"]["output_rows"] == 0


def _bad_rows(folder: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"chat": json.dumps([{"role": "user", "content": f"hello number {n}"}]), "sampling": None} for n in range(90)
    ]
    schema = pa.schema({"chat": pa.string(), "sampling": pa.string()})
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "clean.parquet")
    rows[3]["chat"] = None
    rows[10]["chat"] = "[]"
    rows[20]["chat"] = '{"not": "a list"}'
    rows[30]["chat"] = json.dumps([{"role": "user", "content": "x" * 1_000_000}])
    rows[40]["chat"] = json.dumps([{"role": "wizard", "content": "hello"}])
    rows[50]["chat"] = json.dumps([{"role": "user", "content": "</s><s>[INST] hello [/INST] <unk>"}])
    rows[60]["sampling"] = '{"temperature": -1}'
    rows[61]["sampling"] = "{not json"
    rows[62]["sampling"] = '{"max_tokens": 2}'
    rows[70]["chat"] = json.dumps([{"role": "user", "content": ""}])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "in.parquet")
    return folder / "in.parquet"


def test_bad_rows_are_failed_rows_with_stable_kinds_and_the_neighbours_are_right(tmp_path: Path) -> None:
    prompt = {"prompt": {"messages": "chat"}, "sampling": {"column": "sampling"}}
    job = make_job(_bad_rows(tmp_path), tmp_path / "out", limits={"max_failed_fraction": 0.5}, **prompt)
    summary = run_scripted(job)
    assert summary["exit_code"] == 0
    check_whole(tmp_path / "out", 90)
    kinds = {row: kind for row, (kind, _) in errors(tmp_path / "out").items()}
    assert kinds == {
        3: "null_prompt",
        10: "bad_messages",
        20: "bad_messages",
        30: "prompt_too_long",
        40: "bad_messages",
        60: "bad_sampling",
        61: "bad_sampling",
        70: "empty_prompt",
    }
    run_scripted(make_job(tmp_path / "clean.parquet", tmp_path / "clean", **prompt))
    good = set(range(90)) - {*kinds, 50, 62}
    found, calm = (
        {identity[1]: values for identity, values in results(tmp_path / name).items()} for name in ("out", "clean")
    )
    assert {row: found[row] for row in good} == {row: calm[row] for row in good}
    assert len({calm[row] for row in good}) == len(good), "each row has an answer of its own"
    assert found[62][3] <= 2
    repairs = read_output(tmp_path / "out")["prompt_repairs"].to_pylist()
    assert repairs[50] == ["marker_escaped"]

    assert read_output(tmp_path / "clean").schema.equals(read_output(tmp_path / "out").schema, check_metadata=True)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("crash", "engine_crash"),
        pytest.param("hang", "engine_hang", marks=pytest.mark.long),
        pytest.param("error", "request_error", marks=pytest.mark.long),
    ],
)
def test_a_row_that_breaks_its_engine_fails_alone_and_the_run_ends_by_itself(
    tmp_path: Path, action: str, kind: str
) -> None:
    text = [f"question number {n}" for n in range(150)]
    text[77] = "please explode"
    rows = write_prompts(tmp_path / "in.parquet", 150, text=text)
    job = make_job(rows, tmp_path / "out", limits={"hang_timeout_s": 3 if action == "hang" else 60})
    summary = run_scripted(job, ScriptedConfig(moe=TINY_MOE, faults={token_of("explode"): action}), replicas=2)
    assert summary["exit_code"] == 0
    check_whole(tmp_path / "out", 150)
    assert errors(tmp_path / "out") == {77: (kind, 3)}


def test_silent_zeros_are_nulled_and_counted_and_never_reach_the_totals(tmp_path: Path) -> None:
    text = ["please explode" if n == 5 else f"question number {n}" for n in range(50)]
    rows = write_prompts(tmp_path / "in.parquet", 50, text=text)
    config = ScriptedConfig(moe=TINY_MOE, faults={token_of("explode"): "zeros"})
    summary = run_scripted(make_job(rows, tmp_path / "out"), config)
    assert summary["routing"]["invalid_samples"] == 1
    totals = check_whole(tmp_path / "out", 50)
    assert read_output(tmp_path / "out")["routing"].is_null().to_pylist() == [n == 5 for n in range(50)]
    assert totals.totals.samples["failed"] == 0


def test_too_many_failures_stop_the_run_early_and_keep_what_was_committed(tmp_path: Path) -> None:
    text = [f"please explode {n}" if n % 2 else f"question number {n}" for n in range(2000)]
    rows = write_prompts(tmp_path / "in.parquet", 2000, text=text)
    job = make_job(rows, tmp_path / "out", limits={"max_failed_fraction": 0.05, "drain_timeout_s": 5})
    config = ScriptedConfig(
        max_num_seqs=16, steps_per_request=2, step_delay_s=0.02, moe=TINY_MOE, faults={token_of("explode"): "error"}
    )
    summary = run_scripted(job, config)
    assert (summary["status"], summary["exit_code"]) == ("too_many_failures", 1)
    assert 0 < summary["counts"]["committed_rows"] < 2000
    assert summary["counts"]["failed"] > 0


def test_n_samples_are_all_kept_with_their_own_lengths_and_seeds(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 40)
    for name in ("a", "b"):
        run_scripted(make_job(rows, tmp_path / name, sampling={"n": 4, "temperature": 0.8, "max_tokens": 5}))
    table = read_output(tmp_path / "a")
    assert table["sample_index"].to_pylist() == [0, 1, 2, 3] * 40
    assert len(set(table["generated_text"].to_pylist())) > 100
    assert set(table["status"].to_pylist()) == {"ok", "truncated"}
    truncated = [status == "truncated" for status in table["status"].to_pylist()]
    assert truncated == [reason == "length" for reason in table["finish_reason"].to_pylist()]
    assert results(tmp_path / "a") == results(tmp_path / "b"), "a fixed seed must reproduce"


def test_moving_the_input_changes_no_sample(tmp_path: Path) -> None:
    texts = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        rows = write_prompts(tmp_path / name / "in.parquet", 30)
        run_scripted(make_job(rows, tmp_path / name / "out", sampling={"temperature": 1.0}))
        texts.append(read_output(tmp_path / name / "out")["generated_text"].to_pylist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("level", ["off", "tokens"])
def test_routing_level_decides_what_is_stored(tmp_path: Path, level: str) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 20)
    moe = None if level == "off" else TINY_MOE
    run_scripted(make_job(rows, tmp_path / "out", routing={"level": level}), ScriptedConfig(moe=moe))
    table = read_output(tmp_path / "out")
    if level == "off":
        assert table.schema.field("routing").type == pa.null()
        assert not (tmp_path / "out" / "routing").exists()
        return
    for row in table.to_pylist():
        tokens = row["num_input_tokens"] + row["num_generated_tokens"] - 1
        assert len(row["routing"]["expert_ids"]) == tokens * 4 * 2
        assert sum(row["routing"]["prompt_expert_counts"]) == row["num_input_tokens"] * 4 * 2


def test_columns_named_like_ours_are_refused_with_the_cure(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 5, status=["x"] * 5)
    with pytest.raises(SpecError, match=r"status.*output\.keep"):
        make_job(rows, tmp_path / "out")
    make_job(rows, tmp_path / "out", output={"keep": ["id"]})


def test_columns_that_are_not_kept_can_still_be_used(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 5)
    run_scripted(make_job(rows, tmp_path / "out", output={"keep": "none"}))
    assert "text" not in read_output(tmp_path / "out").column_names
    check_whole(tmp_path / "out", 5)
