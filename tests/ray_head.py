"""A Ray head as an administrator starts it: `ray start --head`, with a token, a dashboard and secrets of its own.

Knows processes, nothing of jobs. Invariant: only what was started here is ended, and nothing of it is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.driver_processes import REPOSITORY, _pids, _uses, wait_until


@dataclass(frozen=True, slots=True)
class Head:
    """A running head."""

    address: str
    """Of its dashboard."""
    token: str
    token_file: Path
    folder: Path
    """Where it keeps everything: logs, uploaded folders, sockets."""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def environment(self) -> dict[str, str]:
        """Of a process that may use it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str], *, num_cpus: int = 8) -> Iterator[Head]:
    """A head whose processes have these variables besides; it demands a token."""
    folder = Path(tempfile.mkdtemp(prefix="tm-hd-", dir="/tmp"))  # short, for Ray's sockets
    head = Head(f"http://127.0.0.1:{free_port()}", secrets.token_hex(32), folder / "token", folder)
    head.token_file.write_text(head.token)
    head.token_file.chmod(0o600)
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [
        "--port=0",
        f"--dashboard-port={head.port}",
        "--dashboard-host=127.0.0.1",
        "--node-ip-address=127.0.0.1",
    ]
    command += [f"--num-cpus={num_cpus}", f"--object-store-memory={256 << 20}", f"--temp-dir={folder / 'ray'}"]
    command += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**head.environment(), "PATH": path, "PYTHONPATH": str(REPOSITORY), **environment}
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(lambda: _answers(head) or process.poll() is not None, "the head answers", deadline_s=90)
        assert process.poll() is None, (folder / "head.log").read_text()
        yield head
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in _pids():
            if _uses(pid, str(folder)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(head: Head) -> bool:
    """Whether its jobs API does, to one who has the token."""
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return isinstance(json.load(answer), list)
    except (OSError, urllib.error.URLError, ValueError):
        return False


class Proxy:
    """A TCP relay that can be cut: all its connections break at once, and none is taken until it is mended."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._is_cut = False
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def num_open(self) -> int:
        with self._lock:
            return len(self._open) // 2

    def cut(self) -> None:
        with self._lock:
            self._is_cut = True
            for connection in self._open:
                _reset(connection)
            self._open.clear()

    def mend(self) -> None:
        with self._lock:
            self._is_cut = False

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._is_cut:
                    _reset(client)
                    continue
                try:
                    server = socket.create_connection(self._target)
                except OSError:  # the head is gone
                    _reset(client)
                    continue
                self._open += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for connection in (source, sink):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open = [each for each in self._open if each not in (source, sink)]


def _reset(connection: socket.socket) -> None:
    """Break a connection as a lost route does, without a goodbye."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def all_text_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below a folder, with its bytes."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                yield path, path.read_bytes()
