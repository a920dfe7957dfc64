"""The README does what it says: its commands run and print what it shows, its tables are complete, its paths exist.

Commands run in order, in one empty directory, with the real engine (four starts of 8 to 30 s). What differs from run
to run or machine to machine is masked on both sides: times, rates, ids, shares and the noise that random weights write.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobs.cli import app
from jobs.spec import parse_spec
from jobs.spec_fields import all_fields
from pipeline.errors import RETRYABLE_KINDS
from pipeline.rows import STATUSES, result_fields
from tests.tiny_models import make_mixtral_8x7b_without_weights

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
EMPTY_LISTS = (("prompt", "examples"), ("fleet", "gpu_types"))
"""Fields whose entries the annotated spec shows in a comment."""
SECTIONS = ("pipeline", "cluster", "jobs")


@dataclass(frozen=True)
class Block:
    note: str
    kind: str
    text: str


@dataclass(frozen=True)
class Step:
    command: str
    shown: list[str]


BLOCKS = [Block(found["note"] or "", found["kind"], found["text"]) for found in BLOCK.finditer(README)]
TO_RUN = [block for block in BLOCKS if not block.note.startswith("not run: ")]
COMMANDS = {"console", "bash", "python"}
SHOWN = {"text", "yaml", "sql"}
"""Kinds of blocks that hold no commands; SQL is run by tests of what it reads."""

MASKS = [
    (r"\d+ h \d+ min|\d+ min \d+ s|\b\d+ s\b", "TIME"),
    (r"[\d,.]+(?= (rows|output tokens)/s)", "RATE"),
    (r"\brun [0-9a-f]{8}\b", "run ID"),
    (r"\d{4}-\d\d-\d\dT[\d:+]+", "WHEN"),
    (r" *\d+\.\d%", " SHARE"),
    (r" +[01]\.\d{3}\b", " DISTANCE"),
    (r"(?<![\w.])(/[\w.-]+)+/(?=\w+\.parquet)", ".../"),
    (r"^(truncated \(\d+ tokens\):) .*", r"\1 NOISE"),
    (r"[\d,]+(?= bytes)", "SIZE"),  # a Parquet file's depends on pyarrow's version
]


def masked(line: str) -> str:
    for pattern, name in MASKS:
        line = re.sub(pattern, name, line)
    return line.rstrip()


def steps_of(block: Block) -> list[Step]:
    """`$ ` begins a command, `> ` continues it, anything else is what it prints. Plain bash blocks print nothing."""
    steps: list[Step] = []
    for line in block.text.splitlines():
        if block.kind == "bash" or line.startswith("$ "):
            steps.append(Step(line.removeprefix("$ "), []))
        elif line.startswith("> ") and not steps[-1].shown:
            steps[-1] = Step(f"{steps[-1].command}\n{line.removeprefix('> ')}", [])
        else:
            steps[-1].shown.append(line)
    return steps


def run_step(step: Step, folder: Path, environment: dict[str, str]) -> None:
    # `make demo` prints its command and runs it in the checkout; here it must not touch the checkout.
    command = step.command.replace("make demo", "echo .venv/bin/tramontane demo && tramontane demo")
    done = subprocess.run(
        ["bash", "-c", command],
        check=False,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"$ {step.command}\n{done.stdout}"
    printed = iter(done.stdout.splitlines())
    for line in step.shown:
        shown = masked(line)
        if shown in ("", "..."):
            continue
        start, is_cut = (shown.removesuffix("..."), True) if shown.endswith(" ...") else (shown, False)
        found = any((real := masked(line)) == shown or (is_cut and real.startswith(start)) for line in printed)
        assert found, f"$ {step.command}\ndidn't print, or not in this order:\n{line}\nbut:\n{done.stdout}"


@pytest.mark.timeout(900)
def test_every_command_prints_what_the_readme_shows(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "200"}
    # What the page calls by its name on the Hugging Face hub is here as a directory, without its weights.
    (tmp_path / "mistralai").mkdir()
    make_mixtral_8x7b_without_weights(tmp_path / "mistralai" / "Mixtral-8x7B-Instruct-v0.1")
    num_steps = 0
    for block in TO_RUN:
        if block.note.startswith("file: "):
            (tmp_path / block.note.removeprefix("file: ")).write_text(block.text)
        if block.kind == "python":
            python = [sys.executable, "-c", block.text]
            done = subprocess.run(python, check=False, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.text}\n{done.stderr}"
            assert len(done.stdout.splitlines()) >= 4, f"printed no table: {block.text}\n{done.stdout}"
        if block.kind in ("console", "bash"):
            for step in steps_of(block):
                run_step(step, tmp_path, environment)
                num_steps += 1
    assert num_steps >= 10


def test_the_labelling_spec_is_valid() -> None:
    [text] = [block.text for block in BLOCKS if block.kind == "yaml" and "kind: label\n" in block.text]
    assert parse_spec(text, name="README.md").label is not None


def test_the_batch_files_spec_is_valid() -> None:
    [text] = [block.text for block in BLOCKS if block.kind == "yaml" and "openai_batch}" in block.text]
    assert parse_spec(text, name="README.md").input.format == "openai_batch"


def test_the_chains_second_spec_is_valid() -> None:
    [text] = [block.text for block in BLOCKS if block.kind == "yaml" and "prefix: topic_" in block.text]
    assert parse_spec(text, name="README.md").input.prefix == "topic_"


def test_only_what_needs_a_gpu_a_cluster_a_network_or_a_package_or_is_run_elsewhere_is_not_run() -> None:
    assert {block.kind for block in TO_RUN} <= COMMANDS | SHOWN
    left_out = [block.note for block in BLOCKS if block not in TO_RUN]
    assert sorted(left_out) == [
        "not run: needs a cluster",
        "not run: needs a cluster",
        "not run: needs the endpoint above",  # tests/cluster/test_batches.py does the same
        "not run: needs the network",
        "not run: needs the network and a GPU",
        "not run: needs the package datasets",
        "not run: stays until Ctrl-C",
        "not run: tests/end_to_end/test_chained_runs.py does the like",
        "not run: tests/end_to_end/test_examples.py does",
        "not run: tests/jobs/test_openai_export.py exports",
    ]


def commands_not_run() -> list[list[str]]:
    lines = [line for block in BLOCKS if block not in TO_RUN for line in block.text.splitlines()]
    commands = [command for line in lines for command in re.split(r" #.*| > .*|&&", line)]
    return [words[1:] for words in map(shlex.split, commands) if words[:1] == ["tramontane"]]


@pytest.mark.parametrize("words", commands_not_run(), ids=" ".join)
def test_commands_that_are_not_run_are_ones_that_there_are(words: list[str]) -> None:
    """Names, options and their values, as the program itself takes them apart."""
    group: Any = typer.main.get_command(app)
    name, command, rest = group.resolve_command(
        group.make_context("tramontane", ["--help"], resilient_parsing=True), words
    )
    assert command.make_context(name, rest).params


def test_there_are_such_commands() -> None:
    assert len(commands_not_run()) >= 15


def annotated_spec() -> str:
    return next(block.text for block in BLOCKS if block.kind == "yaml" and "fleet:" in block.text)


def test_the_annotated_spec_is_valid_and_names_every_field() -> None:
    parse_spec(annotated_spec(), name="README.md")
    shown = yaml.safe_load(annotated_spec())
    for node in all_fields():
        value = shown
        for name in node.path:
            value = value[0] if isinstance(value, list) and value else value
            if node.path[:2] in EMPTY_LISTS and len(node.path) == 3:
                assert f"{name}: " in annotated_spec()
                break
            assert name in value, f"{node.dotted} is missing"
            value = value[name]


def test_the_annotated_spec_shows_the_defaults() -> None:
    shown = yaml.safe_load(annotated_spec())
    chosen = {"prompt.messages"}
    for node in all_fields():
        if node.is_required or node.kind in ("section", "sections") or node.dotted in chosen:
            continue
        if node.path[:2] in EMPTY_LISTS:
            continue
        value = shown
        for name in node.path:
            value = (value[0] if isinstance(value, list) else value)[name]
        assert value == node.default, node.dotted


def first_cells(heading: str) -> set[str]:
    """Names in backticks in the first column of the table whose header line starts so."""
    rows = README.partition(f"\n{heading}")[2].partition("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_column_table_is_the_row_contract() -> None:
    assert first_cells("| column | type |") == {field.name for field in result_fields(None)}
    assert all(f"`{status}`" in README for status in STATUSES)


def test_every_error_kind_is_explained() -> None:
    """Kinds are spelled in calls and in tables of the pipeline's sources; each is explained, and nothing else is."""
    sources = "".join(path.read_text() for path in (ROOT / "pipeline").glob("*.py"))
    raised = set(re.findall(r'(?:RowError|Failure)\(\s*(?:\w+, )?"([a-z]+_[a-z_]+)"', sources))
    raised |= set(re.findall(r'^    kind = "(\w+)"', sources, re.MULTILINE))
    explained = first_cells("| kind | meaning |")
    assert len(raised) > 10
    assert raised | RETRYABLE_KINDS | {"internal"} <= explained
    assert all(f'"{kind}"' in sources for kind in explained)


def test_every_repair_is_explained() -> None:
    from pipeline import chat_encoder, openai_requests, prompts

    repairs = {prompts.SYSTEM_FOLDED, prompts.SYSTEM_MOVED, prompts.EMPTY_SYSTEM_DROPPED, *prompts.MERGED.values()}
    repairs |= {chat_encoder.MARKER_ESCAPED, chat_encoder.CONTROL_TEXT_NEUTRALISED, openai_requests.PARTS_JOINED}
    assert first_cells("| repair | what was done |") == repairs


def tree() -> dict[str, str]:
    """Path -> annotation, from the last text block."""
    listed, folder = {}, ""
    for line in [block.text for block in BLOCKS if block.kind == "text"][-1].splitlines():
        path, _, about = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = path if path.endswith("/") else ""
        listed[path if path == folder else folder + path] = about.strip()
    return listed


def test_the_file_tree_lists_every_source_file_once_and_no_other() -> None:
    """When this fails, add or remove the line of that file in README.md, section Files."""
    listed = tree()
    there = {
        str(path.relative_to(ROOT))
        for section in SECTIONS
        for path in (ROOT / section).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "__init__.py"
    }
    assert {path for path in listed if path.startswith(SECTIONS) and not path.endswith("/")} == there
    assert all((ROOT / path).exists() for path in listed)
    assert all(listed.values()), "each line says what the file is for"


def test_every_path_and_link_exists() -> None:
    for path in re.findall(r"`((?:tests|pipeline|cluster|jobs)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.removeprefix("#") in headings if target.startswith("#") else (ROOT / target).exists(), target


def test_it_starts_with_what_it_is_and_a_command_that_works() -> None:
    assert "$ make demo" in README.splitlines()[:50]
    planned = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert planned.stdout.splitlines()[-1] == ".venv/bin/tramontane demo"
