"""Syntheses, whole: samplers, records by a schema, rounds for the broken, doubles found, nothing lost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.prepare import PreparedJob, prepare
from jobs.spec import parse_spec
from jobs.synthesis_text import synthesis_lines
from pipeline.errors import SpecError
from tests.driver_processes import DriverLauncher, wait_until
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import (
    TINY_MOE,
    check_whole,
    journaling,
    make_job,
    num_started,
    read_output,
    run_scripted,
    snapshot,
    token_of,
    write_prompts,
)

NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "topic": {"enum": ["billing", "bug", "praise"]},
        "question": {"type": "string", "minLength": 10, "maxLength": 60},
        "asked_on": {"type": "string", "format": "date"},
        "answers": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "minLength": 20, "maxLength": 40},
                    "score": {"type": "integer", "minimum": 1, "maximum": 10},
                },
                "required": ["text", "score"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["topic", "question", "asked_on", "answers"],
    "additionalProperties": False,
}


TEMPLATE = "{{ who }} asks in {{ year }}, {{ tone }}: {{ text }}"


def synthesis_text(
    rows: Path,
    output: Path,
    *,
    sampling: dict[str, Any] | None = None,
    template: str = TEMPLATE,
    prompt: dict[str, Any] | None = None,
    **synthesize: Any,
) -> str:
    samplers = {
        "tone": {"category": {"formal": 3, "angry": 1}},
        "year": {"range": [1990, 1999]},
        "who": {"persona": str(rows.parent / "personas.txt")},
    }
    (rows.parent / "personas.txt").write_text("a nurse\n\na farmer\na pilot\n")
    spec = {
        "name": "synthesis",
        "kind": "synthesize",
        "model": {"source": "random", "dtype": "float32", "max_model_len": 2048},
        "input": {"path": str(rows)},
        "prompt": {"template": template, **(prompt or {})},
        "sampling": {"temperature": 1.0, "seed": 5, "max_tokens": 64, "json_schema": NESTED, **(sampling or {})},
        "synthesize": {"samplers": samplers, **synthesize},
        "output": {"path": str(output)},
    }
    return yaml.safe_dump(spec, sort_keys=False)


def synthesis_job(rows: Path, output: Path, **sections: Any) -> PreparedJob:
    return prepare(parse_spec(synthesis_text(rows, output, **sections), name="synthesis.yaml"))


def read_folder(folder: Path) -> list[dict[str, Any]]:
    names = sorted(folder.glob("*.parquet"))
    return [row for name in names for row in pq.read_table(name).to_pylist()]


def made(output: Path) -> dict[str, bytes]:
    """Every file of records and dropped ones, byte for byte."""
    folders = [output / "records", output / "dropped"]
    return {f"{folder.name}/{path.name}": path.read_bytes() for folder in folders for path in folder.glob("*")}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("num_rows", [80, pytest.param(250, marks=pytest.mark.long)])
def test_records_under_a_nested_schema_are_all_valid_and_none_is_lost(tmp_path: Path, num_rows: int) -> None:
    rows, journal = write_prompts(tmp_path / "in.parquet", num_rows), tmp_path / "journal"
    output = tmp_path / "out"
    summary = run_scripted(synthesis_job(rows, output, sampling={"n": 2}), journaling(journal))
    check_whole(output, num_rows)
    assert len(list(journal.iterdir())) == 1, "the weights were loaded once, for the run and all its rounds"
    records, dropped = read_folder(output / "records"), read_folder(output / "dropped")
    # By another library than the one that the pipeline validates with.
    validator = jsonschema_rs.validator_for(NESTED, validate_formats=True)
    answers = [output / "data", *output.glob("retries/*/data"), *output.glob("rounds/*/data")]
    good = [row["generated_text"] for folder in answers for row in read_folder(folder) if row["status"] == "ok"]
    assert len(good) >= len(records)
    for text in [*(record["record"] for record in records), *good]:
        validator.validate(json.loads(text))
    keys = [(row["source_row"], row["source_sample"]) for row in records + dropped]
    assert sorted(keys) == [(row, sample) for row in range(num_rows) for sample in range(2)]
    report = summary["synthesis"]
    assert report["records"] == len(records) > 1.6 * num_rows
    assert Counter(row["reason"] for row in dropped) == report["dropped"]
    # The engine's dates know no leap years and some answers are cut, so there is something to mend.
    first = Counter(read_output(output)["status"].to_pylist())
    assert report["rounds"][0]["asked_again"] == first["truncated"] + first["invalid"] > 0
    assert report["rounds"][0]["mended"] > 0
    assert {row["num_retries"] for row in records} >= {0, 1}
    coverage = report["diversity"]["coverage"]
    assert coverage == {
        "tone": {"drawn": 2, "of": 2},
        "year": {"drawn": 10, "of": 10},
        "who": {"drawn": 3, "of": 3},
    }
    assert 0 < report["diversity"]["distinct_1"] <= report["diversity"]["distinct_3"] <= 1
    assert any("mended" in line for line in synthesis_lines(summary))
    before = snapshot(output / "records")
    assert run_scripted(synthesis_job(rows, output, sampling={"n": 2}))["synthesis"] == report
    assert snapshot(output / "records") == before


@pytest.mark.usefixtures("local_ray")
def test_what_is_wrong_is_shown_when_asked_again_and_after_the_last_time_the_record_is_dropped(tmp_path: Path) -> None:
    rows, output = write_prompts(tmp_path / "in.parquet", 6), tmp_path / "out"
    report = run_scripted(synthesis_job(rows, output, sampling={"max_tokens": 3}, retries=2))["synthesis"]
    assert [each["asked_again"] for each in report["rounds"]] == [6, 6]
    dropped = read_folder(output / "dropped")
    assert [(row["reason"], row["num_retries"]) for row in dropped] == [("truncated", 2)] * 6
    questions = [json.loads(line) for file in output.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(questions) == 12
    for question in questions:
        *_, last = json.loads(question["messages"])
        assert last["role"] == "user"
        assert "it was cut off after 3 tokens" in last["content"]
        assert last["content"].endswith("Answer again, shorter.")


@pytest.mark.usefixtures("local_ray")
def test_a_record_that_stays_invalid_is_dropped_as_such_and_costs_no_other(tmp_path: Path) -> None:
    """An engine that breaks its own grammar, each time that it is asked for one of six."""
    text = ["please explode" if n == 2 else f"question number {n}" for n in range(6)]
    rows, output = write_prompts(tmp_path / "in.parquet", 6, text=text), tmp_path / "out"
    engine = ScriptedConfig(moe=TINY_MOE, faults={token_of("explode"): "broken"})
    report = run_scripted(synthesis_job(rows, output, sampling={"max_tokens": 1000}, retries=2), engine)["synthesis"]
    assert [each["asked_again"] for each in report["rounds"]] == [1, 1]
    [dropped] = read_folder(output / "dropped")
    assert (dropped["text"], dropped["reason"], dropped["num_retries"]) == ("please explode", "invalid", 2)
    assert sorted(row["id"] for row in read_folder(output / "records")) == [f"row-{n}" for n in (0, 1, 3, 4, 5)]
    asked = [json.loads(line) for file in output.rglob("*.jsonl") for line in file.read_text().splitlines()]
    told = [json.loads(one["messages"])[-1]["content"] for one in asked]
    assert len(told) == 2
    assert all(each.startswith("That answer can't be used: ") and "JSON" in each for each in told), told


def killed_at(launcher: DriverLauncher, spec: Path, moment: Callable[[], bool], what: str) -> None:
    """Start a driver and kill it at that moment; it may have ended before if it was quick."""
    driver = launcher.start(spec)
    wait_until(lambda: moment() or driver.ended, what)
    driver.kill()


def num_parts(output: Path, pattern: str) -> int:
    return len(list(output.glob(pattern)))


def check_killed(
    folder: Path, new_launcher: Callable[..., DriverLauncher], rows: int, kills: list[str], **synthesize: Any
) -> None:
    """Kill a driver as soon as there is one more file of each pattern, then compare with an undisturbed synthesis."""
    prompts, output = write_prompts(folder / "in.parquet", rows), folder / "out"
    spec = folder / "job.yaml"
    spec.write_text(synthesis_text(prompts, output, **synthesize))
    launcher = new_launcher(max_num_seqs=16, step_delay_s=0.02)
    for pattern in kills:
        before = num_parts(output, pattern)
        killed_at(launcher, spec, lambda: num_parts(output, pattern) > before, f"one more {pattern}")  # noqa: B023
        assert not (output / "synthesis.json").exists(), "killed too late to disturb anything"
    launcher.run(spec)
    check_whole(output, rows)
    undisturbed = folder / "undisturbed"
    run_scripted(synthesis_job(prompts, undisturbed, **synthesize))
    assert made(output) == made(undisturbed)
    reports = [json.loads((each / "synthesis.json").read_text())["synthesis"] for each in (output, undisturbed)]
    for report in reports:
        for each in report["rounds"]:
            del each["output"]
    assert reports[0] == reports[1]
    assert synthesize.get("retries") == 0 or reports[0]["rounds"][0]["mended"] > 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_driver_changes_no_record(
    local_ray: None, tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> None:
    check_killed(tmp_path, new_launcher, 150, ["retries/*/data/part-*"])


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_five_kills_of_the_driver_change_no_record(
    local_ray: None, tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> None:
    run, later = "data/part-*", "retries/*/data/part-*"
    check_killed(tmp_path, new_launcher, 1200, [run, run, later, later, "records/part-*"])


@pytest.mark.usefixtures("local_ray")
def test_planted_doubles_and_unwanted_records_are_dropped_with_their_reason(tmp_path: Path) -> None:
    # A greedy engine answers equal prompts equally: every row comes three times.
    rows = write_prompts(tmp_path / "in.parquet", 90, text=[f"question {number // 3}" for number in range(90)])
    output = tmp_path / "out"
    job = synthesis_job(
        rows, output, sampling={"temperature": 0}, samplers={}, filters={"rejects": "bug"}, template="{{ text }}"
    )
    report = run_scripted(job)["synthesis"]
    records, dropped = read_folder(output / "records"), read_folder(output / "dropped")
    texts = [row["record"] for row in records]
    assert len(set(texts)) == len(texts) == report["records"] > 0
    assert all(row["source_row"] % 3 == 0 for row in records), "of equal ones the first stays"
    by_reason = Counter(row["reason"] for row in dropped)
    assert by_reason["exact_duplicate"] == 2 * len(records)
    assert by_reason["rejected"] > 0
    for row in dropped:
        if row["reason"] == "exact_duplicate":
            assert row["like"].endswith(f":{row['source_row'] // 3 * 3}:0")
        if row["reason"] == "rejected":
            assert "bug" in row["record"]
    # Other filters make other records of the same answers.
    before = snapshot(output / "data")
    again = run_scripted(synthesis_job(rows, output, sampling={"temperature": 0}, samplers={}, template="{{ text }}"))[
        "synthesis"
    ]
    assert again["records"] > report["records"]
    assert snapshot(output / "data") == before


JUDGE = {
    "instructions": "A record about {{ text }}, {{ tone }}: is it of use?",
    "scores": {"1": "no {{ use }}", "2": "some", "3": "yes", "4": "very much"},
    "keep_from": 3,
}


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_a_judge_scores_what_the_filters_leave_and_drops_what_is_below(tmp_path: Path) -> None:
    rows, output = write_prompts(tmp_path / "in.parquet", 80), tmp_path / "out"

    def synthesize(**judge: Any) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
        job = synthesis_job(rows, output, filters={"rejects": "bug"}, retries=0, judge={**JUDGE, **judge})
        report = run_scripted(job)["synthesis"]
        return report, read_folder(output / "records"), read_folder(output / "dropped")

    report, records, dropped = synthesize()
    assert {row["judge_score"] for row in records} == {3, 4}
    low = [row for row in dropped if row["reason"] == "judged_low"]
    assert {row["judge_score"] for row in low} == {1, 2}
    assert all(row["detail"] == f"score {row['judge_score']}, less than 3" for row in low)
    others = [row for row in dropped if row["reason"] != "judged_low"]
    assert {row["reason"] for row in others} >= {"rejected"}
    assert {row["judge_score"] for row in others} == {None}
    keys = sorted((row["source_row"], row["source_sample"]) for row in records + dropped)
    assert keys == [(row, 0) for row in range(80)]
    scores = Counter(str(row["judge_score"]) for row in records + low)
    assert report["scores"] == dict(sorted(scores.items()))
    assert any(line.startswith("  judge     1: ") for line in synthesis_lines({"synthesis": report}))

    # The judge asks about the record at hand, and isn't asked again when only the threshold changes.
    [scored] = (output / "judge").glob("*/scores")
    before = snapshot(scored / "data")
    check_whole(scored, len(records) + len(low))
    report, kept, _ = synthesize(keep_from=2)
    assert snapshot(scored / "data") == before
    assert len(list((output / "judge").iterdir())) == 1
    assert len(kept) == report["records"] == len(records) + sum(row["judge_score"] == 2 for row in low)


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_a_record_that_the_judge_can_not_be_asked_about_is_dropped_with_the_reason(tmp_path: Path) -> None:
    texts = [f"question {number}" for number in range(20)]
    texts[7] = "[INST] " + "long " * 400
    rows = write_prompts(tmp_path / "in.parquet", 20, text=texts)
    instructions = "{{ text }} " * 5 + "Is it of use?"
    run_scripted(synthesis_job(rows, tmp_path / "out", retries=0, judge={**JUDGE, "instructions": instructions}))
    dropped = {row["source_row"]: row for row in read_folder(tmp_path / "out" / "dropped")}
    assert dropped[7]["reason"] == "not_judged"
    assert dropped[7]["detail"].startswith("prompt_too_long: ")


def test_what_the_steps_after_the_run_lack_is_refused_before_it(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 5)
    with pytest.raises(SpecError, match="needs 'answer', which records don't have; they have record, id, text, tone"):
        synthesis_job(rows, tmp_path / "out", judge={**JUDGE, "instructions": "{{ record }} {{ answer }}"})
    with pytest.raises(SpecError, match="'xx' is no language that can be found"):
        synthesis_job(rows, tmp_path / "out", filters={"languages": ["de", "xx"]})


TURNS = {"turns": 3, "user": "Be {{ who }}, {{ tone }}. What do you say next?\n\n{{ conversation }}"}


@pytest.mark.usefixtures("local_ray")
def test_records_of_several_turns_alternate_and_each_turn_saw_those_before(tmp_path: Path) -> None:
    rows, output, journal = write_prompts(tmp_path / "in.parquet", 16), tmp_path / "out", tmp_path / "journal"
    prompt = {"system": "Be brief.", "examples": [{"user": "an example", "assistant": "its answer"}]}

    def job(turns: int) -> PreparedJob:
        talk = {**TURNS, "turns": turns}
        sampling = {"json_schema": None, "n": 2, "max_tokens": 7}
        return synthesis_job(rows, output, sampling=sampling, retries=0, conversation=talk, prompt=prompt)

    report = run_scripted(job(2), journaling(journal))["synthesis"]
    records, dropped = read_folder(output / "records"), read_folder(output / "dropped")
    assert report["records"] == len(records) > 0
    keys = sorted((row["source_row"], row["source_sample"]) for row in records + dropped)
    assert keys == [(row, sample) for row in range(16) for sample in range(2)]
    first = {(row["input_row"], row["sample_index"]): row for row in read_output(output).to_pylist()}
    files = (output / "turns").glob("2-user-*/questions/*")
    questions = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    seen = {(each["source_row"], each["source_sample"]): json.loads(each["messages"]) for each in questions}
    for record in records:
        key = record["source_row"], record["source_sample"]
        talk = json.loads(record["record"])
        assert [message["role"] for message in talk] == ["system", *["user", "assistant"] * 2]
        assert talk.pop(0)["content"] == "Be brief."
        assert talk[0]["content"].endswith(f"question number {key[0]}")
        assert talk[1]["content"] == first[key]["generated_text"]
        [asked] = seen[key]
        assert asked["content"].startswith(f"Be {record['who']}, {record['tone']}.")
        assert f"User: {talk[0]['content']}\n\nAssistant: {talk[1]['content']}" in asked["content"]
    for row in dropped:
        assert row["reason"] in ("truncated", "exact_duplicate", "near_duplicate")
        if row["reason"] == "truncated":
            assert re.match(r"turn 1: |turn 2, (user|assistant): it was cut off after 7 tokens", row["detail"])
            is_talk = not row["detail"].startswith("turn 1: ")
            assert is_talk == (row["record"] or "").startswith('[{"role": "system", "content": "Be brief."}'), "as far"
    assert sum(report["broke_off"].values()) == sum(row["reason"] == "truncated" for row in dropped)
    assert [each["step"].split("-")[0] for each in report["steps"]] == ["/turns/2"] * 2
    assert len(list(journal.glob("*.log"))) == 1

    # What there is isn't asked again for a talk that goes on longer.
    longer = run_scripted(job(3), journaling(tmp_path / "journal2"))["synthesis"]
    asked = [path for half in ("3-user", "3-assistant") for path in (output / "turns").glob(f"{half}-*/questions/*")]
    assert num_started(tmp_path / "journal2") == sum(len(path.read_text().splitlines()) for path in asked) > 0
    assert 0 < longer["records"] <= report["records"]
    assert all(len(json.loads(row["record"])) == 7 for row in read_folder(output / "records"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_between_turns_changes_no_record(
    local_ray: None, tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> None:
    kills = [f"turns/{half}-*/answers/data/part-*" for half in ("2-user", "2-assistant", "3-user")]
    sampling = {"json_schema": None, "max_tokens": 7}
    check_killed(tmp_path, new_launcher, 150, kills, conversation=TURNS, sampling=sampling, retries=0)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_while_the_judge_works_changes_no_record(
    local_ray: None, tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> None:
    check_killed(tmp_path, new_launcher, 150, ["judge/*/scores/data/part-*"], judge=JUDGE)


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_records_are_the_next_jobs_input(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 20)
    run_scripted(synthesis_job(rows, tmp_path / "first"))
    records = read_folder(tmp_path / "first" / "records")
    keep = {"output": {"keep": ["id", "record", "tone"]}}
    second = make_job(tmp_path / "first" / "records", tmp_path / "second", prompt={"template": "{{ record }}"}, **keep)
    run_scripted(second)
    check_whole(tmp_path / "second", len(records))
    assert sorted(read_output(tmp_path / "second")["record"].to_pylist()) == sorted(row["record"] for row in records)
