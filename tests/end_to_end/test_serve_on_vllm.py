"""The endpoint on real vLLM: what the official client gets equals what a run writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from cluster.serve_app import end_endpoint, start_endpoint
from cluster.serve_settings import ServeSettings
from jobs.batch_runner import ProcessRunner
from jobs.run import RunOptions, run_job
from tests.driver_processes import wait_until
from tests.endpoints import free_port
from tests.whole_runs import make_job, read_output, write_prompts

ROWS = 24
FLEET = "vllm"
"""The session's fleet; see conftest.py."""


@pytest.fixture(scope="module")
def client(vllm_fleet: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    port = free_port()
    batches = str(tmp_path_factory.mktemp("batches"))
    start_endpoint(FLEET, ServeSettings(port=port, model_name="tiny", batches=batches), ProcessRunner())
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0, timeout=60) as found:
        yield found
    end_endpoint()


def chats() -> list[list[dict[str, str]]]:
    return [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"question {n} " + "about rain " * n}]
        for n in range(ROWS)
    ]


@pytest.fixture(scope="module")
def rows(vllm_fleet: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a run makes of these chats."""
    folder = tmp_path_factory.mktemp("rows")
    path = write_prompts(folder / "in.parquet", ROWS, messages=[json.dumps(chat) for chat in chats()])
    job = make_job(path, folder / "out", prompt={"messages": "messages"}, sampling={"max_tokens": 12})
    assert run_job(job, RunOptions(quiet=True), say=lambda line: None, fleet=vllm_fleet)["exit_code"] == 0
    table: list[dict[str, Any]] = read_output(folder / "out").to_pylist()
    return sorted(table, key=lambda row: row["input_row"])


def test_greedy_answers_and_routing_equal_those_of_a_run(client: openai.OpenAI, rows: list[dict[str, Any]]) -> None:
    def ask(messages: Any) -> Any:
        return client.chat.completions.create(
            model="tiny",
            messages=messages,
            temperature=0,
            max_tokens=12,
            extra_body={"tramontane": {"routing": True}},
        )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, chats()))
    for answer, row in zip(answers, rows, strict=True):
        assert answer.choices[0].message.content == row["generated_text"]
        assert answer.usage.prompt_tokens == row["num_input_tokens"]
        assert answer.usage.completion_tokens == row["num_generated_tokens"]
        [routing] = answer.model_extra["tramontane"]["routing"]
        for name in ("prompt_expert_counts", "completion_expert_counts"):
            assert routing[name] == row["routing"][name]


@pytest.mark.long
@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
def test_a_batch_answers_as_the_endpoint_does(url: Any, client: openai.OpenAI) -> None:
    asked: list[dict[str, Any]] = [{"messages": chat, "max_tokens": 12} for chat in chats()]
    if url == "/v1/completions":
        asked = [{"prompt": f"The rain {n}"} for n in range(ROWS)]
    bodies = [{"model": "tiny", "temperature": 0, **body} for body in asked]
    lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": body} for n, body in enumerate(bodies)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("chats.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).completed_at is not None, "it is completed", interval_s=0.5)
    output = client.batches.retrieve(batch.id).output_file_id
    assert output is not None
    results = [json.loads(line)["response"]["body"] for line in client.files.content(output).text.splitlines()]
    ask: Any = client.completions.create if url == "/v1/completions" else client.chat.completions.create
    with ThreadPoolExecutor(8) as pool:
        online = list(pool.map(lambda body: ask(**body).model_dump(), bodies))
    texts = [[choice.get("text") or choice["message"]["content"] for choice in each["choices"]] for each in online]
    assert [[c.get("text") or c["message"]["content"] for c in each["choices"]] for each in results] == texts
    for name in ("prompt_tokens", "completion_tokens"):
        assert [each["usage"][name] for each in results] == [each["usage"][name] for each in online]


def test_streams_of_several_samples_equal_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": chats()[3],
        "n": 3,
        "seed": 7,
        "max_tokens": 10,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"tramontane": {"routing": True}},
    }
    whole = client.chat.completions.create(**asked)
    texts, tokens = ["", "", ""], [0, 0, 0]
    last = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert last is not None
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == sum(tokens)
    assert last.model_extra is not None
    assert whole.model_extra is not None
    assert last.model_extra["tramontane"] == whole.model_extra["tramontane"]


def test_completions_models_stop_and_json_schema(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    free = client.completions.create(model="tiny", prompt="The rain", temperature=0, max_tokens=8, logprobs=1)
    text = free.choices[0].text
    stopped = client.completions.create(model="tiny", prompt="The rain", temperature=0, max_tokens=8, stop=text[4:8])
    assert stopped.choices[0].text == text[: text.index(text[4:8])]
    assert stopped.choices[0].finish_reason == "stop"
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=chats()[0], response_format=form, max_tokens=60)  # type: ignore[arg-type]
    assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)


def test_the_engine_refuses_in_openais_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="more than the model's 512") as refused:
        client.chat.completions.create(model="tiny", messages=chats()[0], max_tokens=600)  # type: ignore[arg-type]
    assert refused.value.code == "context_length_exceeded"
