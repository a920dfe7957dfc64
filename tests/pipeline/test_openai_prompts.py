"""Requests of OpenAI batch files through the template stage: their ids, their sampling, their errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from pipeline.chat_encoder import MixtralV1Encoder
from pipeline.inputs import list_inputs
from pipeline.openai_lines import SCHEMA
from pipeline.openai_requests import CHAT, COMPLETIONS
from pipeline.prompts import Message
from pipeline.read import read_shard
from pipeline.rows import ERROR, PROMPT_IDS, REPAIRS, SAMPLING
from pipeline.sampling import sampling_from_json
from pipeline.settings import PromptSettings, SamplingSettings
from pipeline.shards import Plan
from pipeline.templating import TemplateSettings, TemplateStage

Template = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def template(tmp_path: Path) -> Template:
    """What templating makes of some lines, each an url and a body."""
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "vocab_size": 32000}')

    def run(*requests: tuple[str, dict[str, Any]], **sampling: Any) -> list[dict[str, Any]]:
        lines = [
            json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body})
            for number, (url, body) in enumerate(requests)
        ]
        (tmp_path / "requests.jsonl").write_text("\n".join(lines))
        plan = Plan(tuple(list_inputs(str(tmp_path / "requests.jsonl"), "openai_batch")), 1000)
        settings = TemplateSettings(
            prompt=PromptSettings(messages="body"),
            sampling=SamplingSettings(**{"max_tokens": 8, **sampling}),
            model_dir=str(tmp_path),
            max_model_len=256,
            requests=True,
        )
        rows: list[dict[str, Any]] = TemplateStage(settings)(
            read_shard(plan.files[0], plan.shard(0), SCHEMA)
        ).to_pylist()
        return rows

    return run


def test_a_chat_is_encoded_as_in_any_other_job(template: Template) -> None:
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello"}]
    chat = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    [row] = template((CHAT, {"messages": chat}))
    assert row[PROMPT_IDS] == MixtralV1Encoder().encode([Message("user", "Be brief.\n\nSay\nhello")]).ids
    assert row[REPAIRS] == ["joined_text_parts", "system_folded"]


def test_a_prompt_is_continued_as_it_is(template: Template) -> None:
    text = "Once [INST] upon </s> a time"
    [row] = template((COMPLETIONS, {"prompt": text}))
    tokenizer = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    assert row[PROMPT_IDS] == tokenizer.encode(text, bos=True, eos=False)
    assert row[PROMPT_IDS].count(tokenizer.bos_id) == 1
    assert tokenizer.eos_id not in row[PROMPT_IDS]
    assert row[REPAIRS] == []


def test_what_a_request_leaves_open_comes_from_the_job(template: Template) -> None:
    body = {"prompt": "a", "max_tokens": 3, "temperature": None}
    rows = template((COMPLETIONS, body), (COMPLETIONS, {"prompt": "a"}), temperature=0.5, max_tokens=9, seed=4)
    settings = [sampling_from_json(row[SAMPLING]) for row in rows]
    base = SamplingSettings(temperature=0.5, max_tokens=9, seed=4)
    assert settings == [base.model_copy(update={"max_tokens": 3}), base]


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        ((CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True}), "unsupported_request", "`stream`"),
        ((CHAT, {"messages": []}), "bad_messages", "empty"),
        ((CHAT, {}), "null_prompt", "null"),
        ((COMPLETIONS, {"prompt": ""}), "empty_prompt", "missing or empty"),
        ((COMPLETIONS, {}), "empty_prompt", "missing or empty"),
        ((COMPLETIONS, {"prompt": "a", "temperature": "hot"}), "bad_sampling", "`temperature`"),
        ((COMPLETIONS, {"prompt": "a", "n": 2, "temperature": 0}), "bad_sampling", "greedy"),
        ((COMPLETIONS, {"prompt": "a", "max_tokens": 256}), "prompt_too_long", "max_tokens 256"),
        ((COMPLETIONS, {"prompt": "word " * 500}), "prompt_too_long", "max_model_len 256"),
        (("/v1/responses", {"input": "a"}), "bad_request", "`url`"),
    ],
)
def test_a_wrong_request_fails_alone_with_its_line(
    request_: tuple[str, dict[str, Any]], kind: str, words: str, template: Template
) -> None:
    good = (COMPLETIONS, {"prompt": "a"})
    first, wrong, last = template(good, request_, good)
    assert wrong[PROMPT_IDS] is None
    assert wrong[ERROR]["kind"] == kind
    assert wrong[ERROR]["message"].startswith("line 2: ")
    assert words in wrong[ERROR]["message"]
    assert first[ERROR] is last[ERROR] is None
    assert first[PROMPT_IDS] == last[PROMPT_IDS]
