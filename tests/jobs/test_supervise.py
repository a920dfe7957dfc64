"""What a run that failed says of its cause."""

from __future__ import annotations

import pyarrow as pa
import ray.exceptions

from jobs.supervise import Supervisor
from pipeline.errors import InfrastructureError


def wrapped(cause: Exception) -> Exception:
    """As Ray Data hands on what a stage raised: a task's error around it, another around that."""
    inner = ray.exceptions.RayTaskError("MapWorker(GenerateStage).submit", "remote traceback", cause)
    outer = RuntimeError("the dataset failed")
    outer.__cause__ = inner
    return outer


def test_this_programs_own_error_is_found_inside_rays() -> None:
    ours = InfrastructureError("the storage is full")
    assert Supervisor._as_run_error(wrapped(ours)) is ours


def test_a_mistake_of_ours_is_named_by_its_innermost_cause_and_no_rerun_is_advised() -> None:
    error = Supervisor._as_run_error(wrapped(pa.ArrowNotImplementedError("no kernel matching string_view")))
    assert error.exit_code == 3
    assert error.message.startswith("ArrowNotImplementedError: no kernel matching string_view;")
    assert "report this" in error.message
    assert "rerun the same command" not in error.message


def test_what_machines_do_may_be_rerun() -> None:
    error = Supervisor._as_run_error(wrapped(ConnectionError("reset by peer")))
    assert error.message == "ConnectionError: reset by peer; what is committed is safe: rerun the same command"


def test_an_empty_cause_hides_nothing() -> None:
    death = ray.exceptions.RaySystemError("invalid syntax (generate.py, line 22)")
    death.__cause__ = RuntimeError()
    assert "invalid syntax (generate.py, line 22)" in Supervisor._as_run_error(death).message
