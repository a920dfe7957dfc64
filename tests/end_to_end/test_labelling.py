"""Labelling jobs, whole: label columns for every row, and confidence that calibration mends."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from jobs.calibrate import calibration_lines, read_calibration
from jobs.calibration import accuracy, expected_calibration_error, fit_temperature, reliability, tempered
from jobs.cli import app
from jobs.prepare import PreparedJob, prepare
from jobs.report import closing_lines
from jobs.run import RunOptions, run_job
from jobs.run_diff import read_diff
from jobs.spec import parse_spec
from pipeline.errors import SpecError
from pipeline.read import read_shard
from pipeline.rows import PROMPT_IDS
from pipeline.templating import TemplateStage
from tests.scripted_engine import ScriptedConfig, honest_logs
from tests.whole_runs import TINY_MOE, check_whole, read_output, run_scripted, write_prompts

CHOICES = ["billing", "bug", "bug report", "praise"]


def label_job(rows: Path, output: Path, **label: Any) -> PreparedJob:
    """Labels the column `text`."""
    spec = {
        "name": "labels",
        "kind": "label",
        "model": {"source": "random", "dtype": "float32", "max_model_len": 512},
        "input": {"path": str(rows)},
        "label": {"text": "text", "choices": CHOICES, **label},
        "output": {"path": str(output)},
        "limits": {"max_failed_fraction": 0.5},
    }
    return prepare(parse_spec(yaml.safe_dump(spec), name="labels.yaml"))


@pytest.mark.usefixtures("local_ray")
def test_every_row_gets_its_label_or_an_error_and_the_label_can_abstain(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 60, text=[None, *(f"ticket {n}" for n in range(59))])
    job = label_job(rows, tmp_path / "out", abstain_below=0.6, default="unsure")
    summary = run_scripted(job)
    assert (summary["counts"]["ok"], summary["counts"]["failed"]) == (59, 1)
    check_whole(tmp_path / "out", 60)
    first, *labelled = read_output(tmp_path / "out").to_pylist()
    assert (first["label"], first["label_confidence"], first["generated_text"]) == (None, None, None)
    for row in labelled:
        probabilities = row["label_probabilities"]
        assert list(probabilities) == CHOICES
        assert sum(probabilities.values()) == pytest.approx(1)
        best = max(CHOICES, key=probabilities.get)
        assert (row["generated_text"], row["label_confidence"]) == (best, probabilities[best])
        assert row["label"] == (best if row["label_confidence"] >= 0.6 else "unsure")
    assert {row["label"] for row in labelled} > {"unsure"}
    assert run_scripted(label_job(rows, tmp_path / "out", abstain_below=0.6, default="unsure"))["status"] == "done"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_thousand_answers_of_a_real_engine_are_a_thousand_choices(
    local_ray: None, vllm_fleet: Any, tmp_path: Path
) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 1000)
    job = label_job(rows, tmp_path / "out")
    assert run_job(job, RunOptions(quiet=True), say=lambda line: None, fleet=vllm_fleet)["exit_code"] == 0
    found = read_output(tmp_path / "out").to_pylist()
    assert len(found) == sum(row["generated_text"] in CHOICES and row["label"] in CHOICES for row in found) == 1000


@pytest.mark.usefixtures("local_ray")
def test_labels_are_counted_and_unsure_rows_are_copied_for_review(tmp_path: Path) -> None:
    rows, output = write_prompts(tmp_path / "in.parquet", 150, text=[None, *map(str, range(149))]), tmp_path / "out"

    def run(**label: Any) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], list[str]]:
        said: list[str] = []
        job = label_job(rows, output, abstain_below=0.5, **label)
        summary = run_scripted(job, said=said)
        lines = closing_lines(job, summary, spec_words=["job.yaml"], began=datetime.now(UTC))
        review = [
            row for file in sorted((output / "review").glob("*.parquet")) for row in pq.read_table(file).to_pylist()
        ]
        return summary["labels"], read_output(output).to_pylist(), review, lines

    labels, table, review, lines = run(review_below=0.7)
    sure = [row for row in table if row["label_confidence"] is not None]
    assert labels["rows"] == len(sure) == 149
    assert labels["counts"] == dict(sorted(Counter(row["label"] for row in sure if row["label"]).items()))
    assert labels["unlabelled"] == labels["abstained"] == sum(row["label"] is None for row in sure) > 0
    assert labels["mean_confidence"] == pytest.approx(np.mean([row["label_confidence"] for row in sure]))
    expected = [row for row in sure if row["label_confidence"] < 0.7]
    assert labels["to_review"] == len(expected) > labels["abstained"]
    assert sorted(review, key=itemgetter("input_row")) == expected
    assert f"  review    {len(expected):,} rows -> review/*.parquet" in lines

    (output / "review" / "corrections.csv").write_text("mine")
    # The threshold is no part of the results: another one finds nothing to do but this.
    labels, again, review, _ = run(review_below=0.0001)
    assert (again, review, labels["to_review"]) == (table, [], 0)
    assert [file.name for file in (output / "review").iterdir()] == ["corrections.csv"]


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("wrong_by", [pytest.param(0.6, marks=pytest.mark.long), 2.5])
def test_a_wrong_confidence_is_measured_and_mended(tmp_path: Path, wrong_by: float) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 2000, text=[f"ticket {n}" for n in range(2000)])
    job = label_job(rows, tmp_path / "out")
    gold = true_labels(job)
    run_scripted(job, ScriptedConfig(moe=TINY_MOE, confidence=wrong_by))
    said = np.array([list(row.values()) for row in read_output(tmp_path / "out")["label_probabilities"].to_pylist()])
    temperature = fit_temperature(said, gold)
    assert temperature == pytest.approx(wrong_by, rel=0.05)
    before, after = (
        expected_calibration_error(reliability(each, gold)) for each in (said, tempered(said, temperature))
    )
    assert after < 0.02 < before
    assert accuracy(said, gold) == accuracy(tempered(said, temperature), gold)
    again = label_job(rows, tmp_path / "calibrated", temperature=temperature)
    run_scripted(again, ScriptedConfig(moe=TINY_MOE, confidence=wrong_by))
    mended = read_output(tmp_path / "calibrated")["label_probabilities"].to_pylist()
    assert np.allclose(np.array([list(row.values()) for row in mended]), tempered(said, temperature), atol=1e-4)


@pytest.mark.usefixtures("local_ray")
def test_calibrate_reports_on_an_output_with_true_labels(tmp_path: Path) -> None:
    texts = [f"ticket {n}" for n in range(300)]
    rows = write_prompts(tmp_path / "plain.parquet", 300, text=texts)
    gold = [CHOICES[index] for index in true_labels(label_job(rows, tmp_path / "none"))]
    rows = write_prompts(tmp_path / "in.parquet", 300, text=texts, truth=[None, "other", *gold[2:]])
    run_scripted(label_job(rows, tmp_path / "out"), ScriptedConfig(moe=TINY_MOE, confidence=2.0))
    shown = CliRunner().invoke(
        app, ["calibrate", str(tmp_path / "out"), "--gold", "truth", "--plot", str(tmp_path / "p")]
    )
    assert shown.exit_code == 0, shown.output
    assert "298 rows with a true label in `truth`" in shown.output
    assert "left out: 2 rows" in shown.output
    assert (tmp_path / "p").read_text().startswith("<svg")
    refused = CliRunner().invoke(app, ["calibrate", str(tmp_path / "out"), "--gold", "truth", "--plot", "/none/p"])
    assert isinstance(refused.exception, SpecError)
    assert "can't be written" in str(refused.exception)
    report = read_calibration(str(tmp_path / "out"), "truth")
    assert report["temperature"] == pytest.approx(2.0, rel=0.2)
    assert sum(each["gold"] for each in report["choices"]) == report["rows"] == 298
    assert sum(each["count"] for each in report["reliability"]["before"]) == 298
    with pytest.raises(SpecError, match="no column 'gold' with true labels; it carries id, text, truth"):
        read_calibration(str(tmp_path / "out"), "gold")


@pytest.mark.usefixtures("local_ray")
def test_a_row_gets_several_labels_each_with_a_probability_of_its_own(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 150, text=[None, *map(str, range(149))], label=["mine"] * 150)
    job = label_job(rows, tmp_path / "out", multi=True, threshold=0.6, abstain_below=0.65, default="unsure")
    summary = run_scripted(job)
    check_whole(tmp_path / "out", 150)
    first, *labelled = read_output(tmp_path / "out").to_pylist()
    assert (first["labels"], first["label_confidence"], first["generated_text"]) == (None, None, None)
    for row in labelled:
        said = row["label_probabilities"]
        fitting = [choice for choice in CHOICES if said[choice] >= 0.6]
        assert json.loads(row["generated_text"]) == fitting
        assert row["label_confidence"] == min(p if p >= 0.6 else 1 - p for p in said.values())
        assert row["labels"] == (fitting if row["label_confidence"] >= 0.65 else ["unsure"])
    given = Counter(label for row in labelled for label in row["labels"])
    report = summary["labels"]
    assert report["rows"] == 149
    assert report["counts"] == dict(sorted(given.items()))
    assert sum(given.values()) > 149, "some have several"
    assert report["unlabelled"] == sum(not row["labels"] for row in labelled)
    assert report["abstained"] == given["unsure"] > 0
    same = read_diff(str(tmp_path / "out"), str(tmp_path / "out"))
    assert same["label"]["shift"] == 0
    assert same["label"]["shares"].keys() == {*given, "(none)"} - (set() if report["unlabelled"] else {"(none)"})


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_calibrate_looks_at_each_yes_or_no_of_a_row_with_several_labels(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "plain.parquet", 600, text=[f"ticket {n}" for n in range(600)])
    truth = true_label_lists(label_job(rows, tmp_path / "none", multi=True))
    given = [None, json.dumps(["bug", "other"]), *map(json.dumps, truth[2:])]
    rows = write_prompts(tmp_path / "in.parquet", 600, text=[f"ticket {n}" for n in range(600)], truth=given)
    run_scripted(label_job(rows, tmp_path / "out", multi=True), ScriptedConfig(moe=TINY_MOE, confidence=2.0))
    report = read_calibration(str(tmp_path / "out"), "truth")
    table = read_output(tmp_path / "out").to_pylist()[2:]
    assert (report["rows"], report["decisions"], report["rows_with_another_gold_label"]) == (598, 4 * 598, 2)
    right = [row["labels"] == each for row, each in zip(table, truth[2:], strict=True)]
    assert report["rows_all_right"] == pytest.approx(np.mean(right))
    assert report["temperature"] == pytest.approx(2.0, rel=0.15)
    assert report["expected_calibration_error"]["after"] < 0.03 < report["expected_calibration_error"]["before"]
    for each in report["choices"]:
        assert each["gold"] == sum(each["choice"] in labels for labels in truth[2:])
        assert each["predicted"] == sum(each["choice"] in row["labels"] for row in table)
    assert any("2,392 decisions" in line for line in calibration_lines(report))
    with pytest.raises(SpecError, match=r"0 rows .* have both label probabilities and lists of choices in 'id'"):
        read_calibration(str(tmp_path / "out"), "id")


def true_label_lists(job: PreparedJob) -> list[list[str]]:
    """Each row's true labels, of which the scripted engine, were it honest, tells the probabilities; drawn evenly."""
    stage, honest = TemplateStage(job.template), []
    for shard in job.plan:
        prompts = stage(read_shard(job.plan.files[shard.file_index], shard, job.read_schema))
        honest += [np.exp(honest_logs(ids, 2 * len(CHOICES))) for ids in prompts.column(PROMPT_IDS).to_pylist()]
    stage.close()
    pairs = np.array(honest).reshape(len(honest), len(CHOICES), 2)
    fits = pairs[:, :, 0] / pairs.sum(axis=2)
    ranked = np.argsort(np.argsort(fits.reshape(-1)))
    is_true = (ranked * 0.6180339887 % 1).reshape(fits.shape) < fits
    return [[choice for choice, each in zip(CHOICES, row, strict=True) if each] for row in is_true]


def true_labels(job: PreparedJob) -> np.ndarray:
    """Each row's true label, of which the scripted engine, were it honest, tells the probabilities.

    Drawn by numbers that lie evenly (multiples of the golden ratio) over the rows in order of confidence: drawn by
    chance, the calibration error of 2,000 rows would be 0.02 all by itself.
    """
    stage, honest = TemplateStage(job.template), []
    for shard in job.plan:
        prompts = stage(read_shard(job.plan.files[shard.file_index], shard, job.read_schema))
        honest += [np.exp(honest_logs(ids, len(CHOICES))) for ids in prompts.column(PROMPT_IDS).to_pylist()]
    stage.close()
    gold = np.zeros(len(honest), dtype=np.int64)
    for number, row in enumerate(np.argsort([max(each) for each in honest])):
        ranked = np.argsort(-honest[row])
        reached = np.cumsum(honest[row][ranked]) > number * 0.6180339887 % 1
        gold[row] = ranked[reached.argmax()]
    return gold
