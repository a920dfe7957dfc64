"""One job's output is the next one's input: what a run added is carried along under a prefix, back to the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.prepare import PreparedJob, prepare
from jobs.spec import parse_spec
from pipeline.errors import SpecError
from pipeline.read import read_shard
from pipeline.rows import result_fields
from tests.end_to_end.test_labelling import label_job
from tests.end_to_end.test_synthesis import read_folder, synthesis_text
from tests.whole_runs import check_whole, errors, make_job, read_output, run_scripted, write_prompts


def answer_job(rows: Path, output: Path, prefix: str | None) -> PreparedJob:
    template = {"template": "A ticket about {{ topic_label }}: {{ text }} Answer it."}
    return make_job(rows, output, prompt=template, input={"prefix": prefix})


def records_job(rows: Path, output: Path, template: str, *overrides: str) -> PreparedJob:
    text = synthesis_text(rows, output, template=template, retries=0)  # each round is a run: 2 s
    return prepare(parse_spec(text, name="job.yaml", overrides=overrides))


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_labels_then_answers_then_records_each_carry_all_that_was_before(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 70, text=[None, *(f"ticket {n}" for n in range(69))])
    run_scripted(label_job(rows, tmp_path / "labels"))
    run_scripted(answer_job(tmp_path / "labels" / "data", tmp_path / "answers", "topic_"))
    check_whole(tmp_path / "answers", 70)
    labels = {row["input_row"]: row for row in read_output(tmp_path / "labels").to_pylist()}
    answers = read_output(tmp_path / "answers").to_pylist()
    assert sorted(row["topic_input_row"] for row in answers) == list(range(70))
    ours = [field.name for field in result_fields(None)]
    for row in answers:
        before = labels[row["topic_input_row"]]
        assert row["id"] == before["id"] == f"row-{row['topic_input_row']}"
        for name in (*ours, "label", "label_confidence", "label_probabilities"):
            assert row[f"topic_{name}"] == before[name]
        assert row["input_file"].startswith(str(tmp_path / "labels" / "data" / "part-"))
    # What had failed has nothing to go on with: it fails here too, for the reason that there is.
    [failed] = [row for row in answers if row["status"] == "failed"]
    assert (failed["id"], failed["topic_status"], failed["error"]["kind"]) == ("row-0", "failed", "null_prompt")
    assert list(errors(tmp_path / "answers").values()) == [("null_prompt", 0)]

    template = "{{ who }} reads: {{ draft_generated_text or text or '-' }}"
    run_scripted(records_job(tmp_path / "answers" / "data", tmp_path / "records", template, "input.prefix=draft_"))
    made = read_folder(tmp_path / "records" / "records") + read_folder(tmp_path / "records" / "dropped")
    assert sorted(row["topic_input_row"] for row in made) == list(range(70))
    texts = {row["id"]: row["generated_text"] for row in answers}
    assert all(row["draft_generated_text"] == texts[row["id"]] for row in made)

    # Of records, too: a synthesis over a synthesis.
    settings = ["input.prefix=seed_", "synthesize.samplers={}"]
    run_scripted(records_job(tmp_path / "records" / "records", tmp_path / "again", "Like {{ seed_record }}", *settings))
    first, *_ = read_folder(tmp_path / "again" / "records")
    assert {"seed_source_row", "seed_record", "draft_generated_text", "topic_label", "record"} <= first.keys()


@pytest.mark.usefixtures("local_ray")
def test_without_a_prefix_the_cure_is_named_and_a_prefix_can_not_be_taken_twice(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 10)
    run_scripted(label_job(rows, tmp_path / "labels"))
    with pytest.raises(SpecError, match=r"no column 'topic_label'"):
        answer_job(tmp_path / "labels" / "data", tmp_path / "answers", None)
    with pytest.raises(SpecError, match=r"columns input_file, .* have names that .* set `input\.prefix`"):
        make_job(tmp_path / "labels" / "data", tmp_path / "answers")
    run_scripted(answer_job(tmp_path / "labels" / "data", tmp_path / "answers", "topic_"))
    with pytest.raises(SpecError, match=r"columns topic_input_file, .* begin with input\.prefix 'topic_' already"):
        answer_job(tmp_path / "answers" / "data", tmp_path / "more", "topic_")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_other_columns_keep_their_names_in_parquet_and_in_lines(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        write_prompts(path, 3, generated_text=["a", "b", "c"])
    else:
        lines = [{"id": f"row-{n}", "text": "t", "generated_text": c} for n, c in enumerate("abc")]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    template = {"template": "{{ text }} {{ x_generated_text }}"}
    job = make_job(path, tmp_path / "out", prompt=template, input={"prefix": "x_"})
    assert job.read_schema.names == ["id", "text", "x_generated_text"]
    assert column(job, "x_generated_text") == ["a", "b", "c"]
    assert column(job, "id") == ["row-0", "row-1", "row-2"]


def column(job: PreparedJob, name: str) -> list[Any]:
    [shard] = job.plan
    return read_shard(job.plan.files[0].slim(0), shard, job.read_schema).column(name).to_pylist()
