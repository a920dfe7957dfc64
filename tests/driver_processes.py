"""Drivers as processes of their own, to be interrupted and killed; each with a Ray that leaves nothing behind.

Knows processes and exit codes, nothing of rows. Invariant: only processes started here are signalled, and after
`DriverLauncher.close` none of them, nor of their Rays', is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
DEADLINE_S = 240.0
"""A driver takes 10 s on an idle machine, and six times that on a slow one beside other tests."""


def wait_until(
    condition: Callable[[], bool], what: str, *, deadline_s: float = DEADLINE_S, interval_s: float = 0.02
) -> None:
    """Return as soon as the condition holds; fail the test after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline_s:g} s"
        time.sleep(interval_s)


def processes_below(pid: int, title: str) -> list[psutil.Process]:
    """Those that this process or its children started, with the title in their command lines."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(child.cmdline()):
                found.append(child)
    return found


def process_below(pid: int, title: str) -> psutil.Process | None:
    """The youngest of `processes_below`: an earlier run's may be on its way out."""
    return max(processes_below(pid, title), key=lambda process: process.create_time(), default=None)


class Driver:
    """One `tramontane` process with scripted engines, leader of its own process group."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.scripted_driver", *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def said(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], what: str, *, interval_s: float = 0.02) -> None:
        """Wait for the condition; fail with what the driver said if it ends before that."""
        wait_until(lambda: self.ended or condition(), what, interval_s=interval_s)
        assert condition(), (
            f"{what}: the driver ended before that, with {self._process.returncode}; it said:\n{self.said}"
        )

    def signal_group(self, number: int) -> None:
        """What a terminal does on Ctrl-C: every process of the group gets it."""
        if not self.ended:
            os.killpg(self.pid, number)

    def signal_alone(self, number: int) -> None:
        """What a scheduler does."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Exit code; negative for a signal."""
        try:
            return self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"driver hangs; it said:\n{self.said}") from None

    def kill(self) -> None:
        self.signal_group(signal.SIGKILL)
        self._process.wait()


class DriverLauncher:
    """Starts drivers whose Rays live in one temporary folder."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder = folder
        self._config = folder / "engines.json"
        self._config.write_text(json.dumps({"moe": [4, 8, 2], **config}))
        # Short, for Ray's sockets; see tests/conftest.py.
        self._ray = tempfile.mkdtemp(prefix="tm-drv-", dir="/tmp")
        self._drivers: list[Driver] = []

    def start(self, spec: Path, *arguments: str, command: str = "run") -> Driver:
        log = self._folder / f"driver-{len(self._drivers)}.log"
        environment = {**os.environ, "RAY_TMPDIR": self._ray}
        driver = Driver([str(self._config), command, str(spec), *arguments], environment, log)
        self._drivers.append(driver)
        return driver

    def run(self, spec: Path, *arguments: str, command: str = "run") -> Driver:
        """Start and wait for a driver that should succeed."""
        driver = self.start(spec, *arguments, command=command)
        assert driver.wait() == 0, driver.said
        return driver

    def leftovers(self) -> dict[int, str]:
        """Processes of our drivers' Rays that still run: those with files open or named in our folder."""
        return {pid: name for pid in _pids() if (name := _uses(pid, self._ray)) is not None}

    def daemons(self) -> list[str]:
        """Of these, the ones that hold a Ray together."""
        return [name for name in self.leftovers().values() if "raylet" in name or "gcs_server" in name]

    def close(self) -> None:
        """End what is left. Ray's daemons follow their driver within seconds; workers that are just starting don't."""
        for driver in self._drivers:
            driver.kill()
        try:
            wait_until(lambda: not self.daemons(), "Ray's daemons end with their driver", deadline_s=30)
        finally:
            for pid in self.leftovers():
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self._ray, ignore_errors=True)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _uses(pid: int, folder: str) -> str | None:
    """The process's name if its command line names the folder or it has files open there; workers' show no folder."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().replace(b"\0", b" ").decode(errors="replace")
        files = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return None
    return command if folder in command or any(path.startswith(folder) for path in files) else None
