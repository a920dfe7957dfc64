"""OpenAI's files and batches by the official client, on a server with scripted engines: each batch is a whole run."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from cluster.serve_keys import add_key
from tests.driver_processes import wait_until
from tests.endpoints import Served, get, served
from tests.jobs.test_openai_export import parse
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def endpoint(_ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Eight slow sequences; one batch at a time."""
    folder = tmp_path_factory.mktemp("served")
    keys = folder / "keys.txt"
    keys.write_text("")
    config = ScriptedConfig(max_num_seqs=8, step_delay_s=0.05, moe=TINY_MOE)
    batches = {"batches": str(folder / "batches"), "batches_at_once": 1, "max_file_bytes": 1 << 20}
    with served("mixtral", config, moe=TINY_MOE, keys=str(keys), **batches) as running:
        yield running


def client_of(endpoint: Served) -> openai.OpenAI:
    """With a key of its own."""
    assert endpoint.keys is not None
    key = add_key(endpoint.keys, f"user-{random.getrandbits(40)}")
    return openai.OpenAI(base_url=endpoint.url + "/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture
def client(endpoint: Served) -> Iterator[openai.OpenAI]:
    with client_of(endpoint) as found:
        yield found


def chat_line(custom_id: str, text: str = "hello", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    filled = {"model": "mixtral", "messages": messages, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": filled}


def upload(client: openai.OpenAI, lines: list[Any], name: str = "requests.jsonl") -> str:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    return client.files.create(file=(name, io.BytesIO(text.encode())), purpose="batch").id


def create(client: openai.OpenAI, lines: list[Any], **options: Any) -> Batch:
    return client.batches.create(input_file_id=upload(client, lines), endpoint=CHAT, completion_window="24h", **options)


def until_over(client: openai.OpenAI, batch: Batch) -> Batch:
    seen: list[Batch] = []

    def is_over() -> bool:
        seen.append(client.batches.retrieve(batch.id))
        return seen[-1].status in ("completed", "failed", "cancelled", "expired")

    wait_until(is_over, "the batch is over", interval_s=0.2)
    return seen[-1]


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_is_answered_and_its_bad_request_is_in_the_error_file(client: openai.OpenAI) -> None:
    lines = [chat_line(f"r{n}", f"question {n}") for n in range(6)]
    lines[3]["body"]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    batch = create(client, lines, metadata={"night": "1"})
    assert (batch.status, batch.metadata) == ("validating", {"night": "1"})
    done = until_over(client, batch)
    assert (done.status, done.errors) == ("completed", None)
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 6, "completed": 5, "failed": 1}
    results = lines_of(client, done.output_file_id)
    assert [line["custom_id"] for line in results] == ["r0", "r1", "r2", "r4", "r5"]
    online = client.chat.completions.create(**lines[0]["body"])
    answered: Any = parse(results[0])
    assert answered.choices[0].message.content == online.choices[0].message.content
    assert answered.model == "mixtral"
    [error] = lines_of(client, done.error_file_id)
    assert (error["custom_id"], error["response"]["status_code"]) == ("r3", 400)
    assert parse(error).param == "tools"  # type: ignore[union-attr]
    assert done.usage is not None
    assert done.usage.output_tokens == sum(line["response"]["body"]["usage"]["completion_tokens"] for line in results)
    times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert times == sorted(times)  # type: ignore[type-var]
    _ = Path, get
