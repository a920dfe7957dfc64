"""Workers of an engine end with the process that started them, however that ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.driver_processes import wait_until

PARENT = """
import multiprocessing, sys, threading

def work(ends_with_parent):
    if ends_with_parent:
        import pipeline.worker_end
    print(multiprocessing.current_process().pid, flush=True)
    threading.Event().wait()

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1] == "yes",)).start()
"""


def is_gone(pid: int) -> bool:
    """Ended; where nobody collects orphans they stay as zombies, which hold nothing."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("ends_with_parent", ["yes", "no"])
def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path, ends_with_parent: str) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(program), ends_with_parent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        if ends_with_parent == "yes":
            wait_until(lambda: is_gone(worker), "the worker has ended", deadline_s=10)
        else:  # or this test would prove nothing
            assert not is_gone(worker)
            psutil.Process(worker).kill()


def test_this_process_was_started_by_no_engine_and_is_left_alone() -> None:
    code = "import pipeline.worker_end, os; print(os.getpid())"
    root = str(Path(__file__).parents[2])
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert int(shown.stdout) > 0
