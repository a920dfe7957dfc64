"""Batch files through whole runs and out again: every exported line is read by `openai`'s own types."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from openai.types import BatchError, Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

from jobs.openai_export import export_batch, export_lines
from jobs.openai_results import RunFacts, result_line
from jobs.report import closing_lines
from pipeline.errors import ERROR_KINDS, InfrastructureError, SpecError
from pipeline.parts import OpenPart, open_part
from pipeline.storage import Store
from tests.whole_runs import make_job, read_output, run_scripted, spec_text, write_prompts

FACTS = RunFacts("tiny", 1_700_000_000, "f" * 64, is_batch=True)


def chat_line(custom_id: str, text: str = "hello", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    filled = {"model": "gpt-4o-mini", "messages": messages, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": filled}


def raw_line(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"model": "m", **body}}


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def make_batch_job(path: Path, output: Path, /, **sections: dict[str, Any]) -> Any:
    sections = {"input": {"format": "openai_batch"}, "prompt": {}, **sections}
    return make_job(path, output, **sections)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parse(line: Mapping[str, Any]) -> ChatCompletion | Completion | ErrorObject | BatchError:
    """What a line holds, by the strictest reading of `openai`'s types: validated, where its client only constructs."""
    assert list(line) == ["id", "custom_id", "response", "error"]
    response, error = line["response"], line["error"]
    if response is None:
        return BatchError.model_validate(error, strict=True)
    assert error is None
    assert list(response) == ["status_code", "request_id", "body"]
    body = response["body"]
    if response["status_code"] != 200:
        assert response["status_code"] in (400, 500)
        return ErrorObject.model_validate(body["error"], strict=True)
    kind: Any = Completion if body["object"] == "text_completion" else ChatCompletion
    parsed = kind.model_validate(body, strict=True)
    assert not parsed.model_extra
    return parsed  # type: ignore[no-any-return]


LINES: list[Any] = [
    chat_line("plain"),
    chat_line("sampled", n=3, temperature=0.8, seed=7, max_completion_tokens=4, stop="END"),
    raw_line("raw", prompt="Once upon a time", max_tokens=1),
    "{not json",
    chat_line("plain", "its id is taken"),
    "",
    chat_line("tools", tools=[{"type": "function", "function": {"name": "f"}}]),
    chat_line("streamed", stream=True),
    {**chat_line("elsewhere"), "url": "/v1/embeddings"},
    {"method": "POST", "url": "/v1/chat/completions", "body": {}},
    {"custom_id": "no body", "method": "POST", "url": "/v1/chat/completions"},
    chat_line("no messages", messages=None),
    chat_line("hot", temperature=99),
    chat_line("long", "word " * 2000),
    raw_line("many", prompt=["a", "b"]),
    chat_line("\u2028 fin\u00e9"),
    [1, 2],
]


@pytest.fixture(scope="module")
def exported(_ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    path = write_lines(folder / "requests.jsonl", LINES)
    summary = run_scripted(make_batch_job(path, folder / "out"))
    assert (summary["status"], summary["exit_code"]) == ("done", 0)
    assert summary["counts"]["input_rows"] == 16
    report = export_batch(str(folder / "out"), str(folder / "openai"))
    assert (report["results"], report["errors"], report["missing_rows"]) == (4, 12, 0)
    return folder


def test_every_exported_line_is_read_by_openais_types(exported: Path) -> None:
    lines = [*read_lines(exported / "openai/output.jsonl"), *read_lines(exported / "openai/error.jsonl")]
    assert len(lines) == 16
    for line in lines:
        parse(line)
    assert len({line["id"] for line in lines}) == 16


def test_answers_are_those_of_the_run(exported: Path) -> None:
    lines = {line["custom_id"]: parse(line) for line in read_lines(exported / "openai/output.jsonl")}
    assert list(lines) == ["plain", "sampled", "raw", "\u2028 fin\u00e9"]
    rows = [row for row in read_output(exported / "out").to_pylist() if row["status"] != "failed"]
    for custom_id, completion in lines.items():
        mine = [row for row in rows if row["custom_id"] == custom_id]
        is_raw = custom_id == "raw"
        assert isinstance(completion, Completion if is_raw else ChatCompletion)
        texts = [choice.text if is_raw else choice.message.content for choice in completion.choices]  # type: ignore[union-attr]
        assert texts == [row["generated_text"] for row in mine]
        assert [choice.index for choice in completion.choices] == [row["sample_index"] for row in mine]
        assert [choice.finish_reason for choice in completion.choices] == [row["finish_reason"] for row in mine]
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == mine[0]["num_input_tokens"]
        assert completion.usage.completion_tokens == sum(row["num_generated_tokens"] for row in mine)
        assert completion.model == "random"
    assert len(lines["sampled"].choices) == 3  # type: ignore[union-attr]
    assert max(row["num_generated_tokens"] for row in rows if row["custom_id"] == "sampled") <= 4
    assert [row["num_generated_tokens"] for row in rows if row["custom_id"] == "raw"] == [1]


WRONG = [
    # custom_id, line, HTTP status or None for a line that is no request, code, param
    (None, 4, None, "invalid_json_line", None),
    ("plain", 5, None, "duplicate_custom_id", "custom_id"),
    ("tools", 7, 400, "unsupported_parameter", "tools"),
    ("streamed", 8, 400, "unsupported_parameter", "stream"),
    ("elsewhere", 9, None, "invalid_url", "url"),
    (None, 10, None, "missing_required_parameter", "custom_id"),
    ("no body", 11, None, "missing_required_parameter", "body"),
    ("no messages", 12, 400, "missing_required_parameter", "messages"),
    ("hot", 13, 400, "invalid_value", None),
    ("long", 14, 400, "context_length_exceeded", "messages"),
    ("many", 15, 400, "invalid_value", "prompt"),
    (None, 17, None, "invalid_json_line", None),
]


def test_what_is_wrong_is_said_in_openais_words_with_the_line(exported: Path) -> None:
    found = []
    for line in read_lines(exported / "openai/error.jsonl"):
        error = parse(line)
        assert isinstance(error, (ErrorObject, BatchError))
        number = int((error.message or "").split()[1].rstrip(":"))
        if isinstance(error, BatchError):
            assert error.line == number
        status = line["response"] and line["response"]["status_code"]
        found.append((line["custom_id"], number, status, error.code, error.param))
    assert found == WRONG


def test_error_kinds_of_rows_are_stable(exported: Path) -> None:
    rows = read_output(exported / "out").to_pylist()
    kinds = {row["line"]: row["error"]["kind"] for row in rows if row["error"] is not None}
    assert kinds == {
        4: "bad_row",
        17: "bad_row",
        5: "duplicate_custom_id",
        **dict.fromkeys((9, 10, 11), "bad_request"),
        **dict.fromkeys((7, 8, 15), "unsupported_request"),
        12: "null_prompt",
        13: "bad_sampling",
        14: "prompt_too_long",
    }


def test_an_export_repeats_itself_byte_by_byte(exported: Path, tmp_path: Path) -> None:
    export_batch(str(exported / "out"), str(tmp_path))
    for name in ("output.jsonl", "error.jsonl"):
        assert (tmp_path / name).read_bytes() == (exported / "openai" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error.jsonl", "output.jsonl"]


def test_one_bad_line_in_the_middle_is_one_error_and_the_others_are_answered(local_ray: None, tmp_path: Path) -> None:
    lines: list[Any] = [chat_line(f"request-{number}", f"question {number}") for number in range(1, 201)]
    lines[99] = '{"custom_id": "request-100", "method": "POST", '
    path = write_lines(tmp_path / "requests.jsonl", lines)
    assert run_scripted(make_batch_job(path, tmp_path / "out", output={"keep": "none"}))["exit_code"] == 0
    report = export_batch(str(tmp_path / "out"), str(tmp_path / "openai"))
    assert (report["results"], report["errors"]) == (199, 1)
    results = read_lines(tmp_path / "openai/output.jsonl")
    assert all(isinstance(parse(line), ChatCompletion) for line in results)
    assert [line["custom_id"] for line in results] == [f"request-{n}" for n in range(1, 201) if n != 100]
    [error] = read_lines(tmp_path / "openai/error.jsonl")
    parsed = parse(error)
    assert isinstance(parsed, BatchError)
    assert parsed.line == 100
    assert (parsed.message or "").startswith("line 100 is not JSON")


def test_any_run_is_exported_by_its_id_column_or_file_and_row(local_ray: None, tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 70, text=["hello", None, *["hello"] * 68])
    run_scripted(make_job(rows, tmp_path / "by_id", input={"id": "id"}))
    run_scripted(make_job(rows, tmp_path / "by_row", sampling={"n": 2, "temperature": 1.0}))
    for name, ids in {"by_id": "row-{}", "by_row": "in.parquet:{}"}.items():
        spec = tmp_path / f"{name}.yaml"
        spec.write_text(spec_text(rows, tmp_path / name))
        report = export_batch(str(spec), str(tmp_path / name / "openai"))
        assert (report["results"], report["errors"]) == (69, 1)
        results = read_lines(tmp_path / name / "openai/output.jsonl")
        assert [line["custom_id"] for line in results] == [ids.format(n) for n in range(70) if n != 1]
        assert all(isinstance(parse(line), ChatCompletion) for line in results)
        [error] = read_lines(tmp_path / name / "openai/error.jsonl")
        assert (error["custom_id"], error["response"]["status_code"]) == (ids.format(1), 400)
        parse(error)


def test_an_unfinished_run_is_exported_only_when_told_and_says_what_is_missing(local_ray: None, tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 150)
    run_scripted(make_job(rows, tmp_path / "out"))
    sorted((tmp_path / "out" / "data").iterdir())[1].unlink()
    with pytest.raises(SpecError, match="has 64 of 150 rows without a result; finish it with `tramontane run`"):
        export_batch(str(tmp_path / "out"), str(tmp_path / "openai"))
    assert not (tmp_path / "openai").exists()
    report = export_batch(str(tmp_path / "out"), str(tmp_path / "openai"), is_partial=True)
    assert (report["results"], report["missing_rows"]) == (86, 64)
    assert "64 rows have no result yet" in "\n".join(export_lines(report))


def test_a_failed_export_leaves_the_earlier_one(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("output.jsonl", "error.jsonl"):
        (tmp_path / name).write_text("earlier\n")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.openai_export.result_line", fail)
    with pytest.raises(KeyboardInterrupt):
        export_batch(str(exported / "out"), str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "output.jsonl": "earlier\n",
        "error.jsonl": "earlier\n",
    }


def test_a_part_that_a_retry_writes_again_meanwhile_is_no_damage(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported / "out", tmp_path / "out")
    [part] = (tmp_path / "out" / "data").iterdir()

    def vanish(*args: Any, **options: Any) -> OpenPart:
        part.unlink()
        return open_part(*args, **options)

    monkeypatch.setattr("jobs.openai_export.open_part", vanish)
    with pytest.raises(InfrastructureError, match="was written again during the export; export once the run has ended"):
        export_batch(str(tmp_path / "out"), str(tmp_path / "openai"))
    assert list((tmp_path / "openai").iterdir()) == []


def test_the_command_writes_prints_and_refuses(exported: Path, tmp_path: Path) -> None:
    def tramontane(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "tramontane"), "export", str(exported / "out"), *words]
        return subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    done = tramontane("--openai-batch", "x")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "4 results in x/output.jsonl\n12 errors in x/error.jsonl\n"
    report = json.loads(tramontane("--openai-batch", "x", "--json").stdout)
    assert report["files"] == ["x/output.jsonl", "x/error.jsonl"]
    refused = tramontane("--openai-batch", str(exported / "out" / "data"))
    assert refused.returncode == 2
    assert "lies in a folder of the run itself" in refused.stderr
    assert "--openai-batch" in tramontane().stderr


def test_the_end_of_a_run_says_how_to_export_it(exported: Path) -> None:
    job = make_batch_job(exported / "requests.jsonl", exported / "out")
    lines = closing_lines(job, run_scripted(job), spec_words=["job.yaml"], began=datetime.now(UTC))
    assert f"`tramontane export {exported / 'out'} --openai-batch FOLDER` makes" in "\n".join(lines)


@pytest.mark.parametrize("folder", ["data", "data/x", "_run", "routing/openai"])
def test_the_runs_own_folders_are_refused(folder: str, exported: Path) -> None:
    before = sorted(exported.rglob("*"))
    with pytest.raises(SpecError, match="a folder of the run itself"):
        export_batch(str(exported / "out"), str(exported / "out" / folder))
    assert sorted(exported.rglob("*")) == before


def test_a_file_in_the_way_and_no_run_are_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="choose another folder"):
        export_batch(str(exported / "out"), str(tmp_path / "file"))
    with pytest.raises(SpecError, match="holds no run"):
        export_batch(str(tmp_path), str(tmp_path / "openai"))


def test_files_go_to_an_object_store(exported: Path, s3_bucket: str) -> None:
    url = f"s3://{s3_bucket}/openai"
    export_batch(str(exported / "out"), url)
    for name in ("output.jsonl", "error.jsonl"):
        assert Store(url).read(name) == (exported / "openai" / name).read_bytes()


def failed_row(kind: str, **columns: Any) -> dict[str, Any]:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "line": 3}
    error = {"kind": kind, "message": "line 3: what", "stage": "template", "attempts": 0}
    return {"input_file": "f", "input_row": 2, "status": "failed", "error": error, **line, **columns}


@pytest.mark.parametrize("is_batch", [True, False])
@pytest.mark.parametrize("kind", sorted(ERROR_KINDS))
def test_every_kind_of_error_has_a_shape_that_openai_reads(kind: str, is_batch: bool) -> None:
    facts = RunFacts("tiny", 1, "f", is_batch=is_batch)
    line = result_line([failed_row(kind)], "a", facts)
    assert line.is_error
    parsed = parse(line.value)
    assert isinstance(parsed, (ErrorObject, BatchError))
    assert parsed.code


def test_samples_whose_output_is_invalid_are_no_choices() -> None:
    common = {"input_file": "f", "input_row": 0, "finish_reason": "stop", "num_input_tokens": 3}
    common |= {"num_cached_tokens": 0, "num_generated_tokens": 2}
    good = {**common, "sample_index": 0, "status": "ok", "generated_text": "yes", "error": None}
    error = {"kind": "bad_messages", "message": "no", "stage": "generate", "attempts": 1}
    bad = {**common, "sample_index": 1, "status": "invalid", "generated_text": "{", "error": error}
    completion = parse(result_line([good, bad], "a", FACTS).value)
    assert isinstance(completion, ChatCompletion)
    assert [choice.index for choice in completion.choices] == [0]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4
    assert result_line([bad], "a", FACTS).is_error
