"""`drift` of two finished outputs: the library's figures, for people and as JSON, and what it refuses to compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs.drift import EXPERTS, SHOWN_SLICES, drift_lines, read_drift
from jobs.prepare import PreparedJob
from jobs.summary import SUMMARY, Execution, write_summary
from pipeline.counters import ALL, RunCounters, SampleFacts
from pipeline.engine import MoeShape
from pipeline.errors import SpecError
from pipeline.routing import summarize_row
from pipeline.routing_report import drift
from pipeline.storage import Store
from tests.whole_runs import TINY_MOE, make_job, spec_text, write_prompts


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> PreparedJob:
    folder = tmp_path_factory.mktemp("job")
    return make_job(write_prompts(folder / "in.parquet", 4), folder / "out")


def finish(
    output: Path, job: PreparedJob, *, seed: int, slices: tuple[str, ...] = (ALL,) * 4, moe: MoeShape = TINY_MOE
) -> str:
    """What a run leaves behind whose rows have these slices, each row with routing of its own."""
    job = replace(job, plan=replace(job.plan, limit=None, files=(replace(job.plan.files[0], num_rows=len(slices)),)))
    rng, totals = np.random.default_rng(seed), RunCounters()
    for name in slices:
        ids = rng.random((90, moe.num_layers, moe.num_experts)).argsort(axis=-1)[..., : moe.top_k]
        facts = SampleFacts("ok", 31, routing=summarize_row(ids, 60, 31, moe))
        totals.add_row([facts], num_input_tokens=60, num_cached_tokens=0, moe=moe, slice_name=name)
    write_summary(Store(str(output)), job, totals, Execution(f"run{seed}"), status="done", exit_code=0)
    return str(output)


def rewrite_summary(output: str, **changes: Any) -> None:
    path = Path(output) / SUMMARY
    summary = json.loads(path.read_text())
    for section, fields in changes.items():
        summary[section] |= fields
    path.write_text(json.dumps(summary))


def experts(output: str, **only: str) -> pa.Table:
    table = pq.read_table(Path(output) / EXPERTS)
    for name, value in only.items():
        table = table.filter(pc.equal(table[name].cast(pa.string()), value))
    return table


def distances(report: dict[str, Any], slice_name: str, phase: str) -> list[float]:
    return [row["distance"] for row in report["drift"] if (row["slice"], row["phase"]) == (slice_name, phase)]


def test_every_slice_and_phase_has_the_distance_of_its_own_rows(tmp_path: Path, job: PreparedJob) -> None:
    a = finish(tmp_path / "a", job, seed=1, slices=("en", "fr", "de", "de"))
    b = finish(tmp_path / "b", job, seed=2, slices=("it", "en", "fr", "fr"))
    report = read_drift(a, b)
    assert (report["slices_only_in_a"], report["slices_only_in_b"]) == (["de"], ["it"])
    keys = [(row["slice"], row["phase"], row["layer"]) for row in report["drift"]]
    phases = ("all", "prompt", "completion")
    assert keys == [(name, phase, layer) for name in (ALL, "en", "fr") for phase in phases for layer in range(4)]
    for name in (ALL, "en", "fr"):
        for phase in phases:
            only = {} if name == ALL else {"slice": name}
            only |= {} if phase == "all" else {"phase": phase}
            expected = drift(experts(a, **only), experts(b, **only))
            assert distances(report, name, phase) == expected["distance"].to_pylist()
    assert min(distances(report, ALL, "all")) > 0


def test_an_output_has_no_drift_to_itself_and_a_spec_stands_for_its_output(tmp_path: Path, job: PreparedJob) -> None:
    output = finish(tmp_path / "out", job, seed=1)
    (tmp_path / "job.yaml").write_text(spec_text("in.parquet", output))
    report = read_drift(str(tmp_path / "job.yaml"), output)
    assert report["a"] == report["b"] == {"output": output, "run_id": "run1", "model": "random", "rows": 4}
    assert {row["distance"] for row in report["drift"]} == {0.0}


def test_people_see_every_layer_and_the_slices_that_differ_most(tmp_path: Path, job: PreparedJob) -> None:
    names = tuple(f"slice-{number:02}" for number in range(SHOWN_SLICES + 3))
    report = read_drift(
        finish(tmp_path / "a", job, seed=1, slices=(*names, "mine")), finish(tmp_path / "b", job, seed=2, slices=names)
    )
    lines = drift_lines(report)
    assert lines[0] == f"a  {tmp_path / 'a'}: {len(names) + 1} rows, model random, run run1"
    first = [report["drift"][layer] for layer in range(4)]
    for line, row in zip(lines[5:9], first, strict=True):
        words = line.split()
        assert (words[0], words[1], words[4]) == (
            str(row["layer"]),
            f"{row['distance']:.3f}",
            f"{row['expected_by_chance']:.3f}",
        )
    shown = [line.split() for line in lines[11 : 11 + SHOWN_SLICES]]
    largest = [max(distances(report, words[3], "all")) for words in shown]
    assert [words[0] for words in shown] == [f"{distance:.3f}" for distance in largest]
    assert largest == sorted(largest, reverse=True)
    assert all(
        distances(report, words[3], "all")[int(words[1])] == max(distances(report, words[3], "all")) for words in shown
    )
    assert lines[-3:] == ["... and 3 slices that differ less; --json has all", "", "only in a: mine"]


def test_what_is_not_there_is_shown_as_missing_and_not_as_no_drift(tmp_path: Path, job: PreparedJob) -> None:
    outputs = [finish(tmp_path / name, job, seed=seed) for seed, name in enumerate("ab")]
    for output in outputs:  # as when every completion is one token long
        table = pq.read_table(Path(output) / EXPERTS)
        kept = pc.if_else(pc.equal(table["phase"].cast(pa.string()), "prompt"), table["selections"], 0)
        index = table.schema.get_field_index("selections")
        pq.write_table(table.set_column(index, "selections", kept.cast(pa.uint64())), Path(output) / EXPERTS)
    report = read_drift(*outputs)
    assert distances(report, ALL, "completion") == [None] * 4
    assert [line.split()[3] for line in drift_lines(report)[5:9]] == ["-"] * 4


def test_models_of_different_shape_are_refused_naming_both(tmp_path: Path, job: PreparedJob) -> None:
    a = finish(tmp_path / "a", job, seed=1)
    b = finish(tmp_path / "b", job, seed=1, moe=MoeShape(2, 16, 2))
    with pytest.raises(SpecError, match="one has 4 layers x 8 experts and the other 2 layers x 16 experts") as refusal:
        read_drift(a, b)
    assert refusal.value.exit_code == 2


def test_outputs_that_are_not_finished_or_have_no_routing_are_refused_with_the_cure(
    tmp_path: Path, job: PreparedJob
) -> None:
    good = finish(tmp_path / "good", job, seed=1)
    with pytest.raises(SpecError, match=r"nowhere holds no finished run; give the output directory"):
        read_drift(good, str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()

    partial = finish(tmp_path / "partial", job, seed=1)
    rewrite_summary(partial, counts={"missing_rows": 3, "input_rows": 9})
    with pytest.raises(SpecError, match=r"3 of 9 rows have no result yet in .*partial; .*`tramontane run`"):
        read_drift(partial, good)

    dense = finish(tmp_path / "dense", job, seed=1)
    rewrite_summary(dense, routing={"off_because": "LlamaForCausalLM is a dense model: it has no router"})
    with pytest.raises(SpecError, match=r"dense has no routing to compare: LlamaForCausalLM is a dense model"):
        read_drift(good, dense)

    empty = finish(tmp_path / "empty", job, seed=1)
    (Path(empty) / EXPERTS).unlink()
    with pytest.raises(SpecError, match=r"empty has no routing/experts\.parquet: none of its rows has routing"):
        read_drift(good, empty)
