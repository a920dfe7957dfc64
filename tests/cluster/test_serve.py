"""The endpoint over HTTP, on scripted engines: what the official client gets, what is refused, what is left over."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import random
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray

from cluster.serve_keys import add_key
from cluster.serve_settings import ServeSettings
from jobs.serve import plan_endpoint
from pipeline.errors import SpecError
from tests.driver_processes import wait_until
from tests.endpoints import HOSTILE, Served, get, served
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, token_of

MESSAGES: Any = [{"role": "user", "content": "hello there"}]
ENDLESS: Any = [{"role": "user", "content": "an endless story"}]
DEADLY: Any = [{"role": "user", "content": "a deadly question"}]


@pytest.fixture(scope="module")
def endpoint(_ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two replicas of eight slow sequences, with room for eight more samples; keys of alice (limited) and bob."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# one line per key\n")
    faults = {token_of("endless"): "never", token_of("deadly"): "crash"}
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=0.01, moe=TINY_MOE, faults=faults)
    limits = {"max_waiting": 8, "max_body_bytes": 65536, "body_timeout_s": 1.0, "requests_per_minute": 60}
    with served("mixtral", config, moe=TINY_MOE, replicas=2, keys=str(keys), **limits) as running:
        yield running


@pytest.fixture
def key(endpoint: Served) -> str:
    assert endpoint.keys is not None
    return add_key(endpoint.keys, f"user-{random.getrandbits(40)}")


@pytest.fixture
def client(endpoint: Served, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key=key, max_retries=0, timeout=30) as found:
        yield found


def post(endpoint: Served, key: str, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(endpoint.url + path, json=body, headers=headers, timeout=120, verify=False)


def test_the_official_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mixtral", messages=MESSAGES, temperature=0, user="somebody")
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    parts = [{"type": "text", "text": "hello there"}]
    same = client.chat.completions.create(model="mixtral", messages=[{"role": "user", "content": parts}], temperature=0)
    assert same.choices[0].message.content == choice.message.content


def test_a_seed_decides_what_is_drawn_and_n_samples_differ(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(model="mixtral", messages=MESSAGES, n=3, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert drawn(5) == drawn(5) != drawn(6)
    assert len(set(drawn(5))) == 3


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "mixtral", "messages": MESSAGES, "n": 3, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    texts, ends = ["", "", ""], {}
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 8, "word by word"


def test_completions_take_texts_and_token_ids(client: openai.OpenAI) -> None:
    texts = client.completions.create(model="mixtral", prompt=["one", "two"], n=2, seed=1, logprobs=2, max_tokens=4)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    logs = texts.choices[0].logprobs
    assert logs is not None
    assert logs.tokens is not None
    assert logs.top_logprobs is not None
    assert all(token in top for token, top in zip(logs.tokens, logs.top_logprobs, strict=True))
    ids = client.completions.create(model="mixtral", prompt=[1, 2, 3], temperature=0)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    stream = client.completions.create(model="mixtral", prompt=[1, 2, 3], temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == ids.choices[0].text


def test_log_probabilities_come_with_each_token(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "mixtral", "messages": MESSAGES, "seed": 5, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.content
    assert [len(token.top_logprobs) for token in whole.content] == [2] * len(whole.content)
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed += (chunk.choices[0].logprobs.content or []) if chunk.choices[0].logprobs else []
    assert streamed == whole.content


def test_json_is_generated_when_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = client.chat.completions.create(model="mixtral", messages=MESSAGES, response_format=form)
    assert isinstance(json.loads(answer.choices[0].message.content or "")["age"], int)
    free = client.chat.completions.create(model="mixtral", messages=MESSAGES, response_format={"type": "json_object"})
    assert isinstance(json.loads(free.choices[0].message.content or ""), dict)


def test_routing_comes_back_when_asked_for(client: openai.OpenAI) -> None:
    body = {"tramontane": {"routing": True}}
    answer = client.chat.completions.create(model="mixtral", messages=MESSAGES, n=2, seed=1, extra_body=body)
    assert answer.usage is not None
    assert answer.model_extra is not None
    first, second = answer.model_extra["tramontane"]["routing"]
    assert (first["index"], second["index"]) == (0, 1)
    selections = TINY_MOE.num_layers * TINY_MOE.top_k
    assert sum(first["prompt_expert_counts"]) == answer.usage.prompt_tokens * selections
    generated = sum(sum(each["completion_expert_counts"]) for each in (first, second))
    assert generated == (answer.usage.completion_tokens - 2) * selections


def test_the_safe_prompt_and_the_system_message_are_part_of_the_prompt(client: openai.OpenAI) -> None:
    def tokens(messages: Any, **body: Any) -> int:
        answer = client.chat.completions.create(model="mixtral", messages=messages, extra_body=body)
        return answer.usage.prompt_tokens if answer.usage else 0

    plain = tokens(MESSAGES)
    assert tokens(MESSAGES, safe_prompt=True) > plain + 20
    assert tokens([{"role": "system", "content": "be brief"}, *MESSAGES]) > plain
    assert tokens([{"role": "developer", "content": "be brief"}, *MESSAGES]) > plain


def test_models_are_the_one_there_is(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mixtral"]
    assert client.models.retrieve("mixtral").owned_by == "tramontane"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"tools": []}, "unsupported_parameter", "unsupported parameter `tools`"),
        ({"chat_template": "{{ x }}"}, "unsupported_parameter", "`chat_template`"),
        ({"n": 3, "temperature": 0}, "bad_sampling", "greedy"),
        ({"temperature": -1}, "bad_sampling", "temperature"),
        ({"n": "3"}, "invalid_value", "`n`"),
        ({"n": 500}, "invalid_value", "500 samples"),
        ({"max_tokens": 1000}, "context_length_exceeded", "512"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context_length_exceeded", "512"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "bad_messages", "assistant"),
        ({"top_logprobs": 3}, "invalid_value", "needs `logprobs: true`"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "needs `stream: true`"),
        ({"stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, None, "response_format"),
    ],
)
def test_what_cannot_be_done_is_400_and_says_why(
    changes: dict[str, Any], code: str | None, words: str, endpoint: Served, key: str
) -> None:
    answer = post(endpoint, key, {"model": "mixtral", "messages": MESSAGES, **changes})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert code in (None, error["code"]), error
    assert words in error["message"], error


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer tm-wrong", "Basic dG06dG0=", "Bearer \xff"])
def test_without_a_key_every_route_is_refused(authorization: str | None, endpoint: Served, key: str) -> None:
    """All that the document has, with every method, and some that it hasn't."""
    document = get(endpoint.url + "/openapi.json", headers={"Authorization": f"Bearer {key}"}).json()
    assert len(document["paths"]) >= 6
    files = {"/v1/files", "/v1/files/x", "/v1/files/x/content", "/v1/batches", "/v1/batches/x", "/v1/batches/x/cancel"}
    paths = {*document["paths"], *files, "/openapi.json", "/docs", "/", "/x"}
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    with httpx.Client(base_url=endpoint.url, headers=headers, timeout=30) as stranger:
        for path in sorted(paths):
            for method in ("GET", "POST", "DELETE", "PUT", "OPTIONS"):
                answer = stranger.request(method, path)
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"


def test_keys_are_rotated_without_a_restart(endpoint: Served, key: str) -> None:
    assert endpoint.keys is not None
    assert key not in endpoint.keys.read_text()
    new = add_key(endpoint.keys, f"next-{random.getrandbits(40)}")
    for each in (key, new):
        assert get(endpoint.url + "/healthz", headers={"Authorization": f"Bearer {each}"}).status_code == 200
    before = endpoint.keys.read_text()
    endpoint.keys.write_text("".join(line for line in before.splitlines(keepends=True) if "user-" not in line))
    assert get(endpoint.url + "/healthz", headers={"Authorization": f"Bearer {key}"}).status_code == 401
    assert get(endpoint.url + "/healthz", headers={"Authorization": f"Bearer {new}"}).status_code == 200
    endpoint.keys.write_text("broken\n")
    assert get(endpoint.url + "/healthz", headers={"Authorization": f"Bearer {new}"}).status_code == 401
    endpoint.keys.write_text(before)


def test_a_body_that_is_too_large_or_too_slow_is_refused(endpoint: Served, key: str) -> None:
    large = {"model": "mixtral", "messages": [{"role": "user", "content": "x" * 70_000}]}
    assert post(endpoint, key, large).status_code == 413
    host, port = endpoint.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 100\r\n\r\n{{"
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(head.encode())
        assert b" 408 " in slow.recv(4096).partition(b"\r\n")[0]


def test_a_key_that_asks_too_often_is_told_when_to_come_back(endpoint: Served, key: str) -> None:
    answers: list[httpx.Response] = []
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in range(8):  # a slow machine may ask no faster than it may
            answers += pool.map(lambda _: post(endpoint, key, {}), range(90))
            refused = [answer for answer in answers if answer.status_code == 429]
            if refused:
                break
    assert refused
    assert {answer.status_code for answer in answers} - {408} == {400, 429}  # 408: where a body took too long to come
    assert int(refused[0].headers["retry-after"]) >= 1
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"


class Crowd:
    """Clients that stream an endless story."""

    def __init__(self, endpoint: Served, key: str) -> None:
        self._endpoint, self._key = endpoint, key
        self.statuses: list[int] = []
        self.texts: list[bytes] = []
        """What each was sent, once it is over."""
        self._threads: list[threading.Thread] = []
        self._leave = threading.Event()

    def come(self, count: int) -> None:
        self._threads = [threading.Thread(target=self._read) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        body = {"model": "mixtral", "messages": ENDLESS, "stream": True}
        headers = {"Authorization": f"Bearer {self._key}"}
        url = self._endpoint.url + "/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, verify=False, timeout=120) as answer:
            self.statuses.append(answer.status_code)
            text = b""
            for piece in answer.iter_bytes() if answer.status_code == 200 else ():
                text += piece
                if self._leave.is_set():
                    break
            self.texts.append(text)

    def hang_up(self) -> None:
        self._leave.set()
        for thread in self._threads:
            thread.join(30)


def test_overload_is_503_before_a_stream_begins_and_who_hangs_up_leaves_nothing(endpoint: Served, key: str) -> None:
    crowd = Crowd(endpoint, key)
    crowd.come(40)  # 16 sequences and 8 places to wait
    # A place to wait is 200 only once its first word is there, and the endless stories leave none.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: sorted(crowd.statuses) == [200] * 16 + [503] * 16, "overload", deadline_s=30)
    assert sorted(crowd.statuses) == [200] * 16 + [503] * 16, endpoint.loads()
    wait_until(lambda: endpoint.num_unfinished() == 24, "all places taken", deadline_s=30)
    crowd.hang_up()
    wait_until(lambda: endpoint.num_unfinished() == 0, "nobody's requests are gone", deadline_s=15)
    assert post(endpoint, key, {"model": "mixtral", "messages": MESSAGES}).status_code == 200


@pytest.mark.long
def test_crowds_that_hang_up_again_and_again_leave_nothing(endpoint: Served) -> None:
    """Ray cancels what a cancelled call called: one crowd in eight left a request that ran for ever."""
    assert endpoint.keys is not None
    for _ in range(30):
        crowd = Crowd(endpoint, add_key(endpoint.keys, f"user-{random.getrandbits(40)}"))
        crowd.come(40)
        wait_until(lambda: endpoint.num_unfinished() == 24, "all places taken", deadline_s=30)
        crowd.hang_up()
        wait_until(lambda: endpoint.num_unfinished() == 0, "nobody's requests are gone", deadline_s=15)


def test_a_client_that_hangs_up_on_a_whole_answer_leaves_nothing_either(endpoint: Served, key: str) -> None:
    body = {"model": "mixtral", "messages": ENDLESS}
    headers = {"Authorization": f"Bearer {key}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(endpoint.url + "/v1/chat/completions", json=body, headers=headers, timeout=1)
    wait_until(lambda: endpoint.num_unfinished() == 0, "the request is gone", deadline_s=30)


def test_metrics_count_answers_tokens_and_experts(endpoint: Served, key: str, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="mixtral", messages=MESSAGES)
    text = get(endpoint.url + "/metrics", headers={"Authorization": f"Bearer {key}"}).text
    figures = dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))
    assert float(figures['tramontane_requests_total{code="200",route="/v1/chat/completions"}']) >= 1
    assert float(figures['tramontane_tokens_total{direction="out"}']) >= 1
    assert float(figures["tramontane_first_token_seconds_count"]) >= 1
    assert any(name.startswith("tramontane_requests_running{") for name in figures)
    shares = [float(figures[f'tramontane_expert_share{{expert="{e}",layer="0"}}']) for e in range(8)]
    assert sum(shares) == pytest.approx(1)
    assert 0 < float(figures['tramontane_expert_entropy{layer="0"}']) <= 1


def figure(endpoint: Served, key: str, name: str) -> float:
    text = get(endpoint.url + "/metrics", headers={"Authorization": f"Bearer {key}"}).text
    return float(dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))[name])


def test_metrics_count_what_was_asked(endpoint: Served, key: str, client: openai.OpenAI) -> None:
    names = ["queue_seconds_count", "total_seconds_count", 'tokens_total{direction="in"}', "hang_ups_total"]
    before = [figure(endpoint, key, f"tramontane_{name}") for name in names]
    used = [client.chat.completions.create(model="mixtral", messages=MESSAGES).usage for _ in range(3)]
    with client.chat.completions.create(model="mixtral", messages=ENDLESS, stream=True) as left:
        next(left)
    wait_until(lambda: endpoint.num_unfinished() == 0, "its place is free", deadline_s=15)
    after = [figure(endpoint, key, f"tramontane_{name}") for name in names]
    added = [b - a for a, b in zip(before, after, strict=True)]
    assert added == [3, 3, sum(usage.prompt_tokens for usage in used if usage), 1]


def test_a_request_that_never_fits_is_not_told_to_try_again(endpoint: Served, key: str) -> None:
    answer = post(endpoint, key, {"model": "mixtral", "messages": MESSAGES, "n": 25, "temperature": 1})
    assert answer.status_code == 400
    assert "at most 24 samples" in answer.json()["error"]["message"]


def test_a_prompt_that_kills_engines_is_an_error_and_its_neighbours_are_answered(endpoint: Served, key: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        deadly = pool.submit(post, endpoint, key, {"model": "mixtral", "messages": DEADLY})
        answers = [pool.submit(post, endpoint, key, {"model": "mixtral", "messages": MESSAGES}) for _ in range(16)]
        assert [answer.result().status_code for answer in answers] == [200] * 16
    assert deadly.result().status_code == 500
    assert deadly.result().json()["error"]["code"] == "engine_crash"
    wait_until(lambda: len(endpoint.members()) == 2, "the replicas are replaced", deadline_s=60)


def test_hostile_bodies_are_refused_and_healthy_requests_served(endpoint: Served, key: str) -> None:
    dice = random.Random(7)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=endpoint.url, headers=headers, timeout=30) as hostile:
        for number in range(50):
            body = dice.choice(HOSTILE) if number >= len(HOSTILE) else HOSTILE[number]
            path = dice.choice(["/v1/chat/completions", "/v1/completions"])
            answer = hostile.post(path, content=body)
            assert 400 <= answer.status_code < 500, (path, body[:80], answer.status_code, answer.text)
            assert answer.json()["error"]["message"]
    assert post(endpoint, key, {"model": "mixtral", "messages": MESSAGES}).status_code == 200


def test_the_openapi_document_names_every_answer(endpoint: Served, key: str) -> None:
    document = get(endpoint.url + "/openapi.json", headers={"Authorization": f"Bearer {key}"}).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "413", "429", "503"} <= operation["responses"].keys()
    assert "422" not in operation["responses"]
    assert operation["security"] == [{"key": []}]
    assert "ChatCompletion" in json.dumps(operation["responses"]["200"])
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["mixtral"]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/files/file-1/content", "/v1/batches"])
def test_without_a_directory_there_are_no_batches_and_it_says_why(path: str, endpoint: Served, key: str) -> None:
    answer = get(endpoint.url + path, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 404
    assert "--batches" in answer.json()["error"]["message"]
    document = get(endpoint.url + "/openapi.json", headers={"Authorization": f"Bearer {key}"}).json()
    assert not any(path.startswith("/v1/files") for path in document["paths"])


def test_a_lost_replica_costs_no_request_that_had_not_begun_to_stream(endpoint: Served, key: str) -> None:
    """Both replicas are full of streams, and six requests wait: its streams end in an error event, all six are done."""
    crowd = Crowd(endpoint, key)
    crowd.come(16)
    wait_until(lambda: crowd.statuses == [200] * 16, "sixteen streams", deadline_s=30)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        body = {"model": "mixtral", "messages": MESSAGES}
        waiting = [pool.submit(post, endpoint, key, {**body, "stream": n % 2 == 0}) for n in range(6)]
        wait_until(lambda: endpoint.num_unfinished() == 22, "all have arrived", deadline_s=30)
        assert not any(each.done() for each in waiting)
        victim = next(iter(endpoint.members().values()))
        ray.kill(victim.handle)
        answers = [each.result() for each in waiting]
    crowd.hang_up()
    assert [answer.status_code for answer in answers] == [200] * 6
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[::2])
    assert all(answer.json()["choices"][0]["message"]["content"] for answer in answers[1::2])
    assert sum(b"engine was lost" in text for text in crowd.texts) == 8
    wait_until(lambda: len(endpoint.members()) == 2, "the replica is replaced", deadline_s=60)
    assert victim.replica not in endpoint.members()


def test_a_broken_stream_ends_in_an_error_event(endpoint: Served, key: str, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="mixtral", messages=ENDLESS, stream=True)
    next(stream)
    for member in endpoint.members().values():
        ray.kill(member.handle)
    with pytest.raises(openai.APIError, match="engine was lost"):
        for _ in stream:
            pass
    wait_until(lambda: len(endpoint.members()) == 2, "the replicas are replaced", deadline_s=60)
    assert client.chat.completions.create(model="mixtral", messages=MESSAGES).choices


def test_nobody_is_let_in_from_elsewhere_without_keys(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no API keys are set"):
        plan_endpoint("mixtral", "auto", host="0.0.0.0")
    assert plan_endpoint("mixtral", "auto", host="0.0.0.0", keys=tmp_path / "keys.txt").settings.keys is not None
    assert ServeSettings().is_loopback
