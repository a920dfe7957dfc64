"""The command line as a person or a script meets it: help, speed, exit codes, JSON, and a surface that can't drift."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobs.cli import app
from jobs.init_template import init_template
from tests.machine_speed import Slowdown
from tests.whole_runs import make_job, run_scripted, spec_text, write_prompts

PROGRAM = Path(sys.executable).parent / "tramontane"
SURFACE = Path(__file__).parent / "cli_surface.json"
COMMANDS = [
    "calibrate",
    "demo",
    "diff",
    "doctor",
    "down",
    "drift",
    "export",
    "fleet",
    "init",
    "key",
    "list",
    "logs",
    "manifest",
    "plan",
    "preview",
    "retry",
    "run",
]
COMMANDS += ["schedule", "schema", "serve", "status", "stop", "submit", "tick", "up", "validate"]
HEAVY = ("ray", "torch", "transformers", "vllm", "mistral_common", "pyarrow", "pandas")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
GROUP: Any = typer.main.get_command(app)


def tramontane(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), *map(str, words)]
    return subprocess.run(command, check=False, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def surface() -> dict[str, Any]:
    """Every command with its arguments and options: what scripts out there rely on."""
    found: dict[str, Any] = {"": _parameters(GROUP)}
    for name, command in GROUP.commands.items():
        found[name] = _parameters(command)
    return found


def _parameters(command: Any) -> dict[str, str]:
    return {
        " ".join(parameter.opts) if parameter.param_type_name == "option" else parameter.name: (
            f"{'required' if parameter.required else parameter.default!r}, {'many' if parameter.multiple else 'one'}"
            if parameter.param_type_name == "option"
            else f"argument, {'required' if parameter.required else str(parameter.default)}"
        )
        for parameter in command.params
        if parameter.name != "help"
    }


def test_the_surface_changes_on_purpose_only() -> None:
    """If it should change, write the new one: python -c 'from tests.jobs.test_cli import *; write_surface()'."""
    assert surface() == json.loads(SURFACE.read_text())


def write_surface() -> None:
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_one_line_and_an_example_that_parses(command: str, tmp_path: Path) -> None:
    shown = tramontane(*filter(None, [command]), "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    about = (GROUP.commands[command] if command else GROUP).help.split("\n\n")
    assert len(about) == 2, "one line, then one example"
    assert "\n" not in about[0].strip()
    _, _, example = about[1].strip().partition("Example: tramontane ")
    assert f"Example: tramontane {example}" in shown.stdout
    name, *words = shlex.split(example)
    assert not command or name == command
    GROUP.commands[name].make_context(name, words)


def test_every_command_is_listed_with_its_whole_line(tmp_path: Path) -> None:
    listed = tramontane("--help", cwd=tmp_path).stdout
    assert sorted(GROUP.commands) == COMMANDS
    for command in GROUP.commands.values():
        assert command.help.split("\n\n")[0].strip() in listed


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["validate", "job.yaml"]], ids=" ".join)
def test_help_and_validate_take_less_than_300_ms(words: list[str], tmp_path: Path) -> None:
    """Processor time, best of 5: what the clock shows on the idle machine of `tests.machine_speed`."""
    tramontane("init", cwd=tmp_path)
    times = []
    with Slowdown() as slowdown:
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert tramontane(*words, cwd=tmp_path).returncode == 0
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3 * slowdown.factor


@pytest.mark.parametrize(
    "words", [["--help"], ["plan", "--help"], ["init", "j.yaml"], ["validate", "job.yaml"], ["schema"]]
)
def test_no_heavy_library_is_imported_for_words_alone(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(spec_text("in.parquet", "out", prompt={"template": "{{ text }}"}))
    script = (
        "import sys, contextlib\nfrom jobs.main import main\n"
        f"sys.argv = ['tramontane', *{words!r}]\n"
        "with contextlib.suppress(SystemExit): main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    python = [sys.executable, "-c", script]
    done = subprocess.run(python, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"


def test_version_is_that_of_the_distribution(tmp_path: Path) -> None:
    assert tramontane("--version", cwd=tmp_path).stdout == "tramontane 0.1.0\n"


@pytest.mark.parametrize("name", ["job.yaml", "my job.yaml", "_2026.yml", "été.yaml", "..yaml", "x" * 99])
def test_init_writes_a_valid_spec_under_any_file_name(name: str, tmp_path: Path) -> None:
    assert tramontane("init", name, cwd=tmp_path).returncode == 0
    checked = tramontane("validate", name, cwd=tmp_path)
    assert (checked.returncode, checked.stdout) == (0, f"{name}: valid\n")


def test_init_overwrites_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")
    refused = tramontane("init", cwd=tmp_path)
    assert refused.returncode == 2
    assert "job.yaml exists; choose another name, or overwrite it with --force" in refused.stderr
    assert (tmp_path / "job.yaml").read_text() == "mine"
    assert tramontane("init", "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "job.yaml").read_text() != "mine"


NEWCOMERS_MISTAKES = {
    "no such spec": (["validate", "nope.yaml"], "there is no such file; `tramontane init` writes one"),
    "spec is a folder": (["validate", "."], "Is a directory; name a YAML file"),
    "misspelt key": (["validate", "misspelt.yaml"], "did you mean `sampling.temperature`?"),
    "misspelt --set": (["validate", "job.yaml", "--set", "sampling.temprature=0"], "mean `sampling.temperature`?"),
    "--set without value": (["validate", "job.yaml", "--set", "sampling.n"], "--set"),
    "input path matches nothing": (["plan", "job.yaml", "--set", "input.path=no/*.parquet"], "'no/*.parquet' matches"),
    "column misspelt": (["plan", "job.yaml", "--set", 'prompt.template="{{ txt }}"'], "did you mean 'text'?"),
    "column unlike any": (["run", "job.yaml", "--set", "input.id=number"], "its columns are: id, text"),
    "model is no directory": (
        ["plan", "job.yaml", "--set", "model.source=./nowhere"],
        "give `tiny`, `random`, a directory",
    ),
    "nothing to preview": (["preview", "job.yaml", "--set", "input.limit=0"], "has no rows"),
    "nothing to retry": (["retry", "job.yaml"], "holds no run, so there is nothing to retry; use `tramontane run`"),
    "unknown status": (["retry", "job.yaml", "--status", "bad"], "use one of ok, truncated, invalid, failed"),
    "status of nothing": (["status", "nowhere"], "nowhere holds no run; give an output directory or URL, or a spec"),
    "drift of nothing": (["drift", "nowhere", "out"], "nowhere holds no finished run; give the output directory"),
    "drift of one": (["drift", "out"], "Missing argument 'OUTPUT'"),
    "folder missing": (["init", "no/job.yaml"], "choose a file in a folder that exists"),
    "command misspelt": (["rnu", "job.yaml"], "Did you mean 'run'?"),
    "option misspelt": (["run", "job.yaml", "--quite"], "--quiet"),
    "argument missing": (["run"], "Missing argument 'SPEC'"),
}


@pytest.fixture(scope="module")
def newcomers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    write_prompts(folder / "in.parquet", 5)
    (folder / "job.yaml").write_text(spec_text("in.parquet", "out"))
    (folder / "misspelt.yaml").write_text(spec_text("in.parquet", "out", sampling={"temprature": 0}))
    return folder


@pytest.mark.parametrize("mistake", NEWCOMERS_MISTAKES)
def test_a_newcomers_mistake_is_exit_2_with_the_cure_and_no_traceback(mistake: str, newcomers_folder: Path) -> None:
    words, cure = NEWCOMERS_MISTAKES[mistake]
    done = tramontane(*words, cwd=newcomers_folder)
    assert done.returncode == 2
    assert cure in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (newcomers_folder / "out").exists()


def test_ctrl_c_before_the_first_row_is_exit_130_and_says_what_to_do(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.yaml")
    waiting = subprocess.Popen([PROGRAM, "validate", "job.yaml"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "job.yaml", "w"):  # returns once the program reads, and reads on for as long as this is open
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert said == "interrupted; what is committed is safe: rerun the same command\n"


@pytest.fixture(scope="module")
def finished(_ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec whose run is done, one row of it failed for good."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_prompts(folder / "in.parquet", 20, text=[None, *["hello"] * 19])
    (folder / "job.yaml").write_text(spec_text(rows, folder / "out"))
    run_scripted(make_job(rows, folder / "out"))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        *("validate", "plan", "run", "retry --kind engine_crash", "status", "drift out"),
        pytest.param("preview -n 3", marks=pytest.mark.long),
    ],
)
def test_json_is_all_that_standard_output_holds(command: str, finished: Path) -> None:
    name, *options = command.split()
    done = tramontane(name, "job.yaml", *options, "--json", cwd=finished)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    known = {"validate": "sampling", "plan": "input_tokens", "status": "committed_rows", "drift": "drift"}
    assert (known | {"preview": "timings"}).get(name, "counts") in report


@pytest.mark.long
def test_the_demos_json_is_all_that_standard_output_holds(tmp_path: Path) -> None:
    done = tramontane("demo", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["input_rows"] == 200


def test_the_schema_accepts_what_validate_accepts_and_points_at_what_it_refuses(tmp_path: Path) -> None:
    import jsonschema

    printed = tramontane("schema", cwd=tmp_path)
    assert (printed.returncode, printed.stderr) == (0, "")
    schema = json.loads(printed.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    editor = jsonschema.Draft202012Validator(schema)
    assert list(editor.iter_errors(yaml.safe_load(init_template()))) == []
    assert list(editor.iter_errors(yaml.safe_load(spec_text("in.parquet", "out")))) == []
    misspelt = yaml.safe_load(spec_text("in.parquet", "out", sampling={"temprature": 0}))
    assert [str(error.path[0]) for error in editor.iter_errors(misspelt)] == ["sampling"]


def test_the_end_of_a_run_says_whose_figures_these_are_and_what_to_do_next(finished: Path) -> None:
    said = tramontane("run", "job.yaml", cwd=finished).stderr
    assert f"nothing to do: all 20 of 20 rows are committed in {finished / 'out'}" in said
    assert "the execution of 20" in said
    assert "null_prompt 1" in said
    assert "next: read the column `error`" in said


def test_plan_names_what_changed_since_the_output_was_made(finished: Path) -> None:
    done = tramontane("plan", "job.yaml", "--set", "sampling.max_tokens=7", cwd=finished)
    assert done.returncode == 0
    assert "refused" in done.stdout
    assert "changed: sampling.max_tokens: 6 -> 7" in done.stdout
