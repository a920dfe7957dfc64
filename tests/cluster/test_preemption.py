"""Notices of clouds that take a node back, from a real HTTP server that plays their metadata servers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.preemption import Metadata, wait_for_notice


class Server(ThreadingHTTPServer):
    answers: dict[str, list[str | None]]
    """Per path; None is 404. The last one stays."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *words: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self.reply("aws-token" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else None)

    def do_GET(self) -> None:
        is_known = (
            self.headers["X-aws-ec2-metadata-token"] == "aws-token" or self.headers["Metadata-Flavor"] == "Google"
        )
        answers = self.server.answers[self.path]
        self.reply((answers.pop(0) if len(answers) > 1 else answers[0]) if is_known else None)

    def reply(self, text: str | None) -> None:
        data = (text or "").encode()
        self.send_response(404 if text is None else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_aws_notice_says_when(server: Server) -> None:
    goes_at = (datetime.now(UTC) + timedelta(seconds=100)).strftime("%Y-%m-%dT%H:%M:%SZ")
    notice = f'{{"action": "terminate", "time": "{goes_at}"}}'
    server.answers = {"/latest/meta-data/spot/instance-action": [None, None, notice]}
    assert 90 < wait_for_notice(Metadata("aws", url(server)), poll_s=0.01) <= 100


def test_google_notice_leaves_half_a_minute(server: Server) -> None:
    server.answers = {"/computeMetadata/v1/instance/preempted": ["FALSE", "FALSE", "TRUE"]}
    assert wait_for_notice(Metadata("gcp", url(server)), poll_s=0.01) == 30


def test_no_notice_is_no_notice(server: Server) -> None:
    server.answers = {"/latest/meta-data/spot/instance-action": [None]}
    assert Metadata("aws", url(server)).seconds_left() is None


def test_answers_that_make_no_sense_are_asked_again(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    goes_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    server.answers = {"/latest/meta-data/spot/instance-action": ["<html>", "{}", f'{{"time": "{goes_at}"}}']}
    assert wait_for_notice(Metadata("aws", url(server)), poll_s=0.01) == 0
    assert capfd.readouterr().err.count("metadata:") == 2
