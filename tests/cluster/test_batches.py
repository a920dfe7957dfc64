"""OpenAI's files and batches by the official client, on a server with scripted engines: each batch is a whole run."""

from __future__ import annotations

import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from cluster.serve_app import APPLICATION
from cluster.serve_keys import add_key
from tests.driver_processes import processes_below, wait_until
from tests.endpoints import Served, get, served
from tests.jobs.test_openai_export import parse
from tests.made_up_requests import ask_for_anything
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


def test_files_are_kept_listed_sent_back_and_deleted_whatever_they_are_called(client: openai.OpenAI) -> None:
    content = b"any bytes\r\n\x00\xff"
    names = ["../../../etc/passwd", "a\r\nSet-Cookie: x", "\u00e9" * 400, "plain.jsonl"]
    made = [client.files.create(file=(name, content), purpose="batch") for name in names]
    assert {(file.bytes, file.purpose, file.status) for file in made} == {(len(content), "batch", "processed")}
    assert all(re.fullmatch(r"file-[0-9a-f]{32}", file.id) for file in made)
    assert made[3].filename == "plain.jsonl"
    assert [file.id for file in client.files.list(limit=3)] == [file.id for file in reversed(made)], "over two pages"
    assert [file.id for file in client.files.list(order="asc", purpose="batch")] == [file.id for file in made]
    assert client.files.list(purpose="batch_output").data == []
    for span in ("bytes=2-3", "bytes=90-", "lines=1"):
        whole = client.files.with_raw_response.content(made[1].id, extra_headers={"Range": span})
        assert (whole.status_code, whole.content) == (200, content)
    answer = client.files.content(made[1].id)
    assert answer.content == content
    assert "set-cookie" not in answer.response.headers
    assert client.files.retrieve(made[0].id) == made[0]
    assert client.files.delete(made[0].id).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="you have no file"):
            gone(made[0].id)
    assert len(client.files.list().data) == 3
    for wrong in ({"limit": 0}, {"order": "up"}, {"after": made[0].id}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.list(**wrong)  # type: ignore[arg-type]
        assert refused.value.param == next(iter(wrong))


def test_nobody_sees_uses_or_deletes_what_is_anothers(client: openai.OpenAI, endpoint: Served) -> None:
    batch = create(client, ["{no request"])
    with client_of(endpoint) as other:
        assert other.files.list().data == []
        assert other.batches.list().data == []
        hidden: list[Callable[[], Any]] = [
            lambda: other.files.retrieve(batch.input_file_id),
            lambda: other.files.content(batch.input_file_id),
            lambda: other.files.delete(batch.input_file_id),
            lambda: other.batches.retrieve(batch.id),
            lambda: other.batches.cancel(batch.id),
            lambda: other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
        ]
        for look in hidden:
            with pytest.raises(openai.NotFoundError, match="you have no"):
                look()
    assert client.batches.retrieve(batch.id).id == batch.id


def test_a_file_that_holds_no_requests_fails_with_the_numbers_of_its_lines(client: openai.OpenAI) -> None:
    lines: list[Any] = [
        chat_line("a"),
        "{not json",
        {**chat_line("b"), "url": "/v1/embeddings"},
        {**chat_line("c"), "url": "/v1/completions"},
        "",
        chat_line("a"),
        chat_line("d", model="gpt-9"),
        {**chat_line("e"), "body": None},
        {**chat_line("f"), "custom_id": 7},
    ]
    failed = until_over(client, create(client, lines))
    assert failed.status == "failed"
    assert failed.failed_at is not None
    assert (failed.output_file_id, failed.error_file_id) == (None, None)
    assert failed.errors is not None
    found = [(error.line, error.code, error.param) for error in failed.errors.data or []]
    assert found == [
        (2, "invalid_json_line", None),
        (3, "invalid_url", "url"),
        (4, "invalid_url", "url"),
        (6, "duplicate_custom_id", "custom_id"),
        (7, "model_not_found", "body.model"),
        (8, "missing_required_parameter", "body"),
        (9, "missing_required_parameter", "custom_id"),
    ]
    later = create(client, ["{no request"])
    assert [batch.id for batch in client.batches.list(limit=1)] == [later.id, failed.id], "over two pages"
    with pytest.raises(openai.ConflictError, match="is failed and can't be cancelled"):
        client.batches.cancel(failed.id)


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_that_is_too_large_is_413_before_all_of_it_is_taken(announced: bool, client: openai.OpenAI) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    pieces = [head, *[b"y" * 65536] * 48]
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Authorization": f"Bearer {client.api_key}"}
    body: Any = b"".join(pieces) if announced else iter(pieces)
    answer = httpx.post(f"{client.base_url}files", content=body, headers=headers, timeout=30)
    assert answer.status_code == 413, answer.text
    assert answer.json()["error"]["code"] in ("body_too_large", "file_too_large")
    assert client.files.list().data == []


@pytest.mark.parametrize(
    ("form", "files", "words"),
    [
        ({"purpose": "assistants"}, {"file": b"x"}, "`purpose` must be `batch`"),
        ({"purpose": "batch"}, {}, "`file` is missing"),
        ({"purpose": "batch", "file": "/etc/passwd"}, {}, "`file` is missing"),
        (
            {"purpose": "batch", "expires_after[seconds]": "3600"},
            {"file": b"x"},
            "unsupported parameter `expires_after",
        ),
        ({"purpose": "batch"}, {"file": b"x", "other": b"y"}, "can't be read"),
    ],
)
def test_uploads_that_say_something_else_are_400(
    form: dict[str, str], files: dict[str, bytes], words: str, client: openai.OpenAI
) -> None:
    parts = {name: (None, value.encode()) for name, value in form.items()}
    headers = {"Authorization": f"Bearer {client.api_key}"}
    answer = httpx.post(f"{client.base_url}files", files={**parts, **files}, headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
        ({"model": "/models/other"}, "model"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"input_file_id": "../../keys.txt"}, None),
    ],
)
def test_a_batch_that_cannot_be_is_refused_by_name(
    changes: dict[str, Any], param: str | None, client: openai.OpenAI
) -> None:
    body = {"input_file_id": "file-0", "endpoint": CHAT, "completion_window": "24h", **changes}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        client.post("/batches", body=body, cast_to=object)
    assert refused.value.status_code == (404 if param is None else 400)
    assert refused.value.param == (param or "input_file_id")
    assert client.batches.list().data == []


def test_the_openapi_document_has_files_and_batches(client: openai.OpenAI, endpoint: Served) -> None:
    document = get(endpoint.url + "/openapi.json", headers={"Authorization": f"Bearer {client.api_key}"}).json()
    upload = document["paths"]["/v1/files"]["post"]
    form = upload["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "purpose"]
    assert upload["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/FileObject")
    asked = document["components"]["schemas"]["BatchRequest"]["properties"]
    assert asked.keys() == {"completion_window", "input_file_id", "endpoint", "metadata"}
    assert {"/v1/files/{file_id}/content", "/v1/batches/{batch_id}/cancel"} <= document["paths"].keys()


def test_requests_that_are_made_up_are_answered_as_the_document_says(client: openai.OpenAI, endpoint: Served) -> None:
    seen = ask_for_anything(endpoint, 100, key=client.api_key)
    assert len({(method, path) for method, path, _ in seen}) >= 10
    assert any(status == 200 for _, _, status in seen)


@pytest.mark.long
def test_a_batch_that_is_cancelled_keeps_what_is_done_and_the_next_one_runs(client: openai.OpenAI) -> None:
    first = create(client, [chat_line(f"r{n}", f"question {n}") for n in range(4000)])
    second = create(client, [chat_line("s0")])
    third = create(client, [chat_line("t0")])
    wait_until(lambda: progress(client, first) > 0, "requests are answered")
    assert client.batches.retrieve(second.id).status == "in_progress", "its file is sound; it waits"
    assert client.batches.cancel(third.id).status in ("cancelling", "cancelled")
    assert until_over(client, third).status == "cancelled"
    assert client.batches.cancel(first.id).status == "cancelling"
    client.files.delete(first.input_file_id)
    ended = until_over(client, first)
    assert ended.status == "cancelled"
    assert ended.cancelled_at is not None
    assert ended.request_counts is not None
    assert 0 < ended.request_counts.completed < ended.request_counts.total == 4000
    ids = [line["custom_id"] for line in lines_of(client, ended.output_file_id)]
    assert len(set(ids)) == len(ids) == ended.request_counts.completed
    assert until_over(client, second).status == "completed"


@pytest.mark.long
@pytest.mark.parametrize("killed", [False, True])
def test_an_endpoint_that_starts_again_goes_on_with_its_batches(
    killed: bool, client: openai.OpenAI, endpoint: Served
) -> None:
    """Whether it was ended in peace or its process died."""
    batch = create(client, [chat_line(f"r{n}", f"question {n}") for n in range(1000)])
    wait_until(lambda: progress(client, batch) > 0, "requests are answered")
    if killed:
        [ingress] = processes_below(os.getpid(), f"ServeReplica:{APPLICATION}")
        ingress.kill()
        ingress.wait()
    else:
        endpoint.restart()
    wait_until(lambda: answers(client), "it answers again")
    done = until_over(client, batch)
    assert done.status == "completed"
    assert [line["custom_id"] for line in lines_of(client, done.output_file_id)] == [f"r{n}" for n in range(1000)]
    [log] = endpoint.batches.glob(f"*/{batch.id}/process.log")
    assert re.search(r"resumes .*: [1-9][\d,]* of 1,000 rows already committed", log.read_text())


def progress(client: openai.OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    return counts.completed if counts else 0


def answers(client: openai.OpenAI) -> bool:
    try:
        return bool(client.models.list().data)
    except openai.APIError:
        return False
