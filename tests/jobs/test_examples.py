"""The examples that come along: valid, with input that can be made again, and copied whole by `tramontane init`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.init_files import EXAMPLES
from jobs.prepare import prepare
from jobs.spec import load_spec
from pipeline.errors import SpecError
from tests.example_data import files

NAMES = ("pairs", "tickets", "translation")


def test_each_is_valid_as_it_lies_there() -> None:
    assert {load_spec(path).name for path in EXAMPLES.glob("*.yaml")} == set(NAMES)


def test_their_input_is_what_the_generator_writes() -> None:
    """If it should change: python -m tests.example_data."""
    there = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.iterdir() if path.suffix != ".yaml"}
    assert there == files()


@pytest.mark.parametrize("name", NAMES)
def test_init_copies_an_example_that_needs_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "--example", name])
    assert done.exit_code == 0, done.output
    assert f"`tramontane run {name}.yaml`" in done.output
    job = prepare(load_spec(f"{name}.yaml"))
    assert job.plan.num_rows > 0
    assert {Path(file.path).parent for file in job.plan.files} == {tmp_path}


def test_init_puts_an_example_where_it_is_told_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my jobs"
    folder.mkdir()
    (folder / "askers.txt").write_text("mine")
    refused = CliRunner().invoke(app, ["init", "--example", "pairs", "my jobs/job.yaml"])
    assert isinstance(refused.exception, SpecError)
    assert "my jobs/askers.txt exists; choose another name" in str(refused.exception)
    assert [path.name for path in folder.iterdir()] == ["askers.txt"]
    (folder / "askers.txt").unlink()
    assert CliRunner().invoke(app, ["init", "--example", "pairs", "my jobs/job.yaml"]).exit_code == 0
    assert prepare(load_spec(folder / "job.yaml")).spec.input.path == "my jobs/documents.jsonl"
    unknown = CliRunner().invoke(app, ["init", "--example", "labels"])
    assert "use one of pairs, tickets, translation" in str(unknown.exception)
