"""An object store that is away for seconds in the middle of a run costs time, and neither the run nor a row."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipeline.storage import Store
from tests.driver_processes import DriverLauncher
from tests.whole_runs import check_whole, spec_text, write_prompts

OUTAGE_S = 6.0


class Wire:
    """A TCP relay to a server that can be cut: open connections break, and new ones are refused."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._open: list[socket.socket] = []
        self._listener = self._listen(0)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._relay, daemon=True).start()

    def cut(self) -> None:
        self._listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._listener = self._listen(self.port)
        threading.Thread(target=self._relay, daemon=True).start()

    @staticmethod
    def _listen(port: int) -> socket.socket:
        return socket.create_server(("127.0.0.1", port), reuse_port=False)

    def _relay(self) -> None:
        listener = self._listener
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    address = urlsplit(s3_server)
    assert address.hostname is not None
    assert address.port is not None
    relay = Wire(address.hostname, address.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
    yield relay
    relay.cut()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_store_that_is_away_for_seconds_costs_neither_the_run_nor_a_row(
    s3_bucket: str, wire: Wire, tmp_path: Path, new_launcher: Callable[..., DriverLauncher]
) -> None:
    output = f"s3://{s3_bucket}/out"
    spec = tmp_path / "job.yaml"
    spec.write_text(spec_text(write_prompts(tmp_path / "in.parquet", 600), output))
    driver = new_launcher(step_delay_s=0.4, max_num_seqs=32).start(spec)
    driver.until(lambda: bool(Store(output).list("data")), "a part", interval_s=0.2)
    wire.cut()
    time.sleep(OUTAGE_S)
    assert not driver.ended, driver.said
    wire.mend()
    assert driver.wait() == 0, driver.said
    check_whole(output, 600)
