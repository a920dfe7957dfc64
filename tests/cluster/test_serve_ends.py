"""How an endpoint's answers end that don't end by themselves: by the time a request may take, and by its own end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from cluster.serve_app import end_endpoint, start_endpoint
from jobs.batch_runner import ProcessRunner
from pipeline.errors import InfrastructureError
from tests.driver_processes import wait_until
from tests.endpoints import Served, served
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, token_of

ENDLESS: Any = [{"role": "user", "content": "an endless story"}]
LONG: Any = [{"role": "user", "content": "a long story"}]
REQUEST_TIMEOUT_S, DRAIN_TIMEOUT_S = 5.0, 20.0


@pytest.fixture(scope="module")
def endpoint(_ray_session: None) -> Iterator[Served]:
    """An answer takes 1.6 s, and a streamed one 0.2 s more for each word."""
    faults = {token_of("endless"): "never"}
    config = ScriptedConfig(max_num_seqs=8, steps_per_request=8, step_delay_s=0.2, moe=TINY_MOE, faults=faults)
    limits = {"request_timeout_s": REQUEST_TIMEOUT_S, "drain_timeout_s": DRAIN_TIMEOUT_S}
    with served("mixtral", config, moe=TINY_MOE, **limits) as running:
        yield running


def chat(endpoint: Served, messages: Any, **body: Any) -> httpx.Response:
    asked = {"model": "mixtral", "messages": messages, "temperature": 0, **body}
    return httpx.post(endpoint.url + "/v1/chat/completions", json=asked, timeout=60, verify=False)


def test_an_answer_that_takes_too_long_is_504_and_leaves_its_place(endpoint: Served) -> None:
    answer = chat(endpoint, ENDLESS)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "request_timeout"
    wait_until(lambda: endpoint.num_unfinished() == 0, "its place is free", deadline_s=5)


def test_a_stream_that_takes_too_long_ends_in_an_error_event(endpoint: Served) -> None:
    with (
        openai.OpenAI(base_url=endpoint.url + "/v1", api_key="none", max_retries=0, timeout=60) as client,
        pytest.raises(openai.APIError, match="took longer than a request may"),
    ):
        for _ in client.chat.completions.create(model="mixtral", messages=ENDLESS, stream=True):
            pass
    wait_until(lambda: endpoint.num_unfinished() == 0, "its place is free", deadline_s=5)


def test_a_port_that_is_taken_is_said_in_a_line_and_serve_is_not_left_behind(endpoint: Served) -> None:
    end_endpoint()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = endpoint.settings.model_copy(update={"port": port})
        with pytest.raises(InfrastructureError) as refused:
            start_endpoint(endpoint.name, taken, ProcessRunner())
    taken_port = f"port {port} of 127.0.0.1 is taken by another program; end that, or give --port"
    assert str(refused.value) == f"the endpoint doesn't start: {taken_port}"
    start_endpoint(endpoint.name, endpoint.settings, ProcessRunner())
    assert chat(endpoint, LONG).status_code == 200


def test_at_its_end_an_endpoint_finishes_what_it_began_and_lets_nobody_in(endpoint: Served) -> None:
    whole = chat(endpoint, LONG, max_tokens=16).json()["choices"][0]["message"]["content"]
    answers: list[httpx.Response] = []
    streamed: list[str] = []
    ends: list[bool] = []

    def stream() -> None:
        with openai.OpenAI(base_url=endpoint.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
            for chunk in client.chat.completions.create(
                model="mixtral", messages=LONG, temperature=0, max_tokens=16, stream=True
            ):
                streamed.append(chunk.choices[0].delta.content or "")

    threads = [
        threading.Thread(target=stream),
        threading.Thread(target=lambda: answers.append(chat(endpoint, LONG, max_tokens=16))),
    ]
    threads[0].start()
    wait_until(lambda: bool(streamed), "a stream has begun", deadline_s=20)
    threads[1].start()
    wait_until(lambda: endpoint.num_unfinished() == 2, "both are begun", deadline_s=20)
    end = threading.Thread(target=lambda: ends.append(end_endpoint()))
    end.start()
    refused: list[int] = []

    def is_refused() -> bool:
        try:
            refused.append(chat(endpoint, LONG, max_tokens=1).status_code)
        except httpx.TransportError:  # Serve is gone
            return True
        return refused[-1] == 503

    wait_until(is_refused, "nobody is let in any more", deadline_s=20)
    for thread in (*threads, end):
        thread.join(60)
    assert ends == [True], "every answer was given to its end"
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [whole]
    assert "".join(streamed) == whole
