"""`diff` of two labelling runs: what moved, which limits it passes, the exit code, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.prepare import PreparedJob
from jobs.run_diff import read_diff
from jobs.run_diff_text import diff_lines
from jobs.summary import Execution, write_summary
from pipeline.counters import ALL, RunCounters, SampleFacts
from pipeline.errors import SpecError
from pipeline.routing import summarize_row
from pipeline.storage import Store
from tests.whole_runs import TINY_MOE, make_job, spec_text, write_prompts

ROWS = 400
LABELS = ["billing", "bug", "praise"]
LIMITS = {"confidence": 0.2, "tokens": 0.2, "label": 0.3}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> PreparedJob:
    folder = tmp_path_factory.mktemp("job")
    return make_job(write_prompts(folder / "in.parquet", ROWS), folder / "out")


def finish(
    output: Path,
    job: PreparedJob,
    *,
    seed: int,
    shares: tuple[float, ...] = (0.5, 0.3, 0.2),
    sure: float = 2.0,
    num_tokens: int = 40,
    limits: dict[str, float] | None = None,
    labelled: bool = True,
) -> str:
    """What a run leaves behind: two parts, one row without a result, one that abstained; routing, summary and spec."""
    rng, totals, store = np.random.default_rng(seed), RunCounters(), Store(str(output))
    lengths = rng.poisson(num_tokens, ROWS)
    for length in lengths.tolist():
        ids = rng.random((length, TINY_MOE.num_layers, TINY_MOE.num_experts)).argsort(axis=-1)[..., :2]
        facts = SampleFacts("ok", 1, routing=summarize_row(ids, length, 1, TINY_MOE))
        totals.add_row([facts], num_input_tokens=length, num_cached_tokens=0, moe=TINY_MOE, slice_name=ALL)
    columns: dict[str, Any] = {"num_input_tokens": pa.array(lengths, pa.int32())}
    columns["num_generated_tokens"] = pa.array([None, *[1] * (ROWS - 1)], pa.int32())
    if labelled:
        names = [None, None, *rng.choice(LABELS, ROWS - 2, p=shares)]
        columns["label"] = pa.array(names).dictionary_encode()
        columns["label_confidence"] = pa.array([None, *rng.beta(sure, 1, ROWS - 1)], pa.float64())
    (output / "data").mkdir(parents=True)
    for number, part in enumerate((pa.table(columns)[:150], pa.table(columns)[150:])):
        pq.write_table(part, output / "data" / f"part-00000-{number * 150:012d}.parquet")
    write_summary(store, job, totals, Execution(f"run{seed}"), status="done", exit_code=0)
    store.put("_run/spec.json", json.dumps({"drift": limits or {}}).encode())
    return str(output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, job: PreparedJob) -> dict[str, str]:
    """`monday` and `tuesday` are alike; on the odd day rows are longer, and labels others and surer."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "monday": finish(folder / "monday", job, seed=1),
        "tuesday": finish(folder / "tuesday", job, seed=2, limits=LIMITS),
        "odd": finish(folder / "odd", job, seed=3, shares=(0.01, 0.04, 0.95), sure=9, num_tokens=60, limits=LIMITS),
    }


def test_rows_of_the_same_kind_pass_no_limit(runs: dict[str, str]) -> None:
    report = read_diff(runs["monday"], runs["tuesday"])
    assert (report["exit_code"], report["exceeded"]) == (0, [])
    assert diff_lines(report)[-1] == "within the limits on label, confidence, tokens"
    same = read_diff(runs["monday"], runs["monday"])
    shifts = [same["label"], same["confidence"], *same["tokens"].values(), *same["routing"]]
    assert [each["shift"] for each in shifts] == pytest.approx([0.0] * len(shifts), abs=1e-7)
    assert diff_lines(same)[-1] == "no limit is set: see `drift` in a spec"


def test_other_labels_surer_ones_and_longer_rows_pass_the_limits(runs: dict[str, str]) -> None:
    report = read_diff(runs["monday"], runs["odd"])
    assert report["exit_code"] == 1
    assert [each["what"] for each in report["exceeded"]] == ["label", "confidence", "input tokens"]
    tables = [pq.read_table(f"{runs[name]}/data") for name in ("monday", "odd")]
    confidences = [table["label_confidence"].drop_null().to_numpy() for table in tables]
    assert report["confidence"]["means"] == pytest.approx([each.mean() for each in confidences])
    exact = max(abs((confidences[0] <= x).mean() - (confidences[1] <= x).mean()) for x in np.concatenate(confidences))
    assert report["confidence"]["shift"] == pytest.approx(exact, abs=5e-3)
    tokens = [table["num_input_tokens"].to_numpy().mean() for table in tables]
    assert report["tokens"]["input"]["shift"] == pytest.approx(tokens[1] / tokens[0] - 1)
    assert report["tokens"]["generated"]["means"] == [1, 1]
    labels = [table["label"].to_pylist()[1:] for table in tables]
    expected = {name: [each.count(name) / (ROWS - 1) for each in labels] for name in LABELS}
    assert report["label"]["shares"] == expected | {"(none)": [1 / (ROWS - 1)] * 2}
    assert [each["layer"] for each in report["routing"]] == list(range(TINY_MOE.num_layers))
    lines = diff_lines(report)
    assert any(line.startswith("drift: confidence moved by 0.") for line in lines)
    assert any(line.startswith("drift: input tokens moved by ") and "more than the 20.0%" in line for line in lines)


def test_limits_are_those_of_the_second_run_or_of_a_spec_and_decide_on_the_exit_code(
    runs: dict[str, str], tmp_path: Path
) -> None:
    spec = tmp_path / "limits.yaml"

    def exit_code(*words: str, **drift: float) -> int:
        spec.write_text(spec_text("in.parquet", "out", drift=drift))
        return CliRunner().invoke(app, ["diff", runs["monday"], runs["odd"], *words]).exit_code

    assert exit_code() == 1
    assert exit_code("--spec", str(spec)) == 0
    assert exit_code("--spec", str(spec), tokens=0.1) == 1
    assert exit_code("--spec", str(spec), tokens=100) == 0
    shown = CliRunner().invoke(app, ["diff", runs["monday"], runs["odd"], "--json"])
    assert (json.loads(shown.stdout)["exit_code"], shown.exit_code) == (1, 1)


def test_routing_that_moves_passes_its_limit(runs: dict[str, str], job: PreparedJob, tmp_path: Path) -> None:
    other = Path(finish(tmp_path / "other", job, seed=4, limits={"routing": 0.05}))
    assert read_diff(runs["monday"], str(other))["exit_code"] == 0
    path = other / "routing" / "experts.parquet"
    table = pq.read_table(path)
    moved = np.where((table["expert"].to_numpy() == 0) & (table["layer"].to_numpy() == 2), 5, 1)
    selections = pa.array(table["selections"].to_numpy() * moved, table.schema.field("selections").type)
    pq.write_table(table.set_column(table.schema.get_field_index("selections"), "selections", selections), path)
    assert [each["what"] for each in read_diff(runs["monday"], str(other))["exceeded"]] == ["routing, layer 2"]


def test_what_cannot_be_compared_is_refused(runs: dict[str, str], job: PreparedJob, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"holds no finished run"):
        read_diff(runs["monday"], str(tmp_path))
    with pytest.raises(SpecError, match=r"has 0 finished runs of a job with input\.new: since_last_run"):
        read_diff(str(tmp_path), None)
    plain = finish(tmp_path / "plain", job, seed=5, labelled=False)
    report = read_diff(runs["monday"], plain)
    assert (report["label"], report["confidence"]) == (None, None)
    Path(plain, "_run", "spec.json").write_text(json.dumps({"drift": {"label": 0.1}}))
    with pytest.raises(SpecError, match=r"drift\.label is 0\.1, but .* don't both have label to compare"):
        read_diff(runs["monday"], plain)
