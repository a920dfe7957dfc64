"""How commands end that met what they have no words of their own for, or that nobody listens to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.main import _exit_code
from tests.whole_runs import spec_text, write_prompts


def raising(error: Exception) -> Callable[[], object]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "cure"),
    [
        (PermissionError("NoCredentialsError: Unable to locate credentials"), 2, "correct the path or the credentials"),
        (ConnectionError("EndpointConnectionError: no route"), 3, "see that the storage is there, then rerun"),
    ],
)
def test_storage_that_refuses_or_is_away_is_one_line_with_its_cure(
    error: Exception, code: int, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(raising(error)) == code
    assert capsys.readouterr().err == f"error: {error}; {cure}\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), BrokenPipeError("x")])
def test_anything_else_is_shown_whole_and_is_never_exit_code_1(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(raising(error)) == 3
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert f"error: unexpected {type(error).__name__}" in said


def with_a_closed_pipe(which: str, *words: str, unbuffered: bool = False) -> subprocess.CompletedProcess[bytes]:
    """The command with standard output or error a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    other = {"stdout": "stderr", "stderr": "stdout"}[which]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    try:
        return subprocess.run(
            words, check=False, timeout=120, env=environment, **{which: writing, other: subprocess.PIPE}
        )
    finally:
        os.close(writing)


def test_a_run_goes_on_when_nobody_reads_what_it_says() -> None:
    say = "import sys\nfor n in range(9): print(n, file=sys.stderr, flush=True)\nprint('done')"
    source = f"from jobs.main import main; main(lambda: exec({say!r}))"
    ended = with_a_closed_pipe("stderr", sys.executable, "-c", source)
    assert (ended.returncode, ended.stdout) == (0, b"done\n")


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_report_that_nobody_reads_is_not_exit_code_1(tmp_path: Path, unbuffered: bool) -> None:
    (tmp_path / "job.yaml").write_text(spec_text(write_prompts(tmp_path / "in.parquet", 3), tmp_path / "out"))
    program = str(Path(sys.executable).with_name("tramontane"))
    ended = with_a_closed_pipe("stdout", program, "plan", str(tmp_path / "job.yaml"), unbuffered=unbuffered)
    assert (ended.returncode, ended.stderr) == (3, b"")
