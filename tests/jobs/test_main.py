"""How commands end that met what they have no words of their own for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobs.main import _exit_code


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
