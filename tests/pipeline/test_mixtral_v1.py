"""A model is Mixtral 8x7B v0.1 when it behaves like it; its fine-tunes keep the format that they were trained on."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from pipeline.chat_template import ChatTemplate
from pipeline.errors import RowError
from pipeline.jinja_process import RenderLimits
from pipeline.mixtral_v1 import PROBES, is_mixtral_v1, template_writes_v1, v1_text
from tests.chat_templates import FINE_TUNED, OFFICIAL, SECOND
from tests.tiny_models import MIXTRAL_CONFIG, write_v1_model

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
KINDS: dict[str, Any] = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_v1_model(tmp_path_factory.mktemp("v1")))


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: "-".join(message.role for message in probe))
def test_a_probes_expected_text_is_that_of_mistral_common(probe: Any) -> None:
    request: Any = ChatCompletionRequest(messages=[KINDS[turn.role](content=turn.content) for turn in probe])
    v1 = MistralTokenizer.v1()
    pieces = v1.decode(v1.encode_chat_completion(request).tokens, special_token_policy=SpecialTokenPolicy.KEEP)
    assert v1_text(probe) == pieces.replace("▁", " ").replace("<0x0A>", "\n")


@pytest.mark.parametrize("dialect", ["plain", "transformers"])
@pytest.mark.parametrize("name", [*OFFICIAL, *FINE_TUNED])
def test_probes_are_rendered_as_transformers_renders_them(hugging_face: Any, name: str, dialect: Any) -> None:
    from jinja2 import TemplateError

    template = (OFFICIAL | FINE_TUNED)[name]
    with ChatTemplate(template, TOKENS, dialect=dialect) as chat_template:
        for probe in PROBES:
            chat = [{"role": turn.role, "content": turn.content} for turn in probe]
            try:
                expected = hugging_face.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except TemplateError as error:
                with pytest.raises(RowError, match=re.escape(str(error))) as caught:
                    chat_template.render(probe)
                assert caught.value.kind == "template_error"
            else:
                assert chat_template.render(probe) == expected


@pytest.mark.parametrize("name", OFFICIAL)
def test_mistrals_own_templates_write_v1(name: str) -> None:
    assert template_writes_v1(OFFICIAL[name], TOKENS)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_a_template_that_differs_a_little_does_not_write_v1(name: str) -> None:
    assert not template_writes_v1(FINE_TUNED[name], TOKENS)


@pytest.mark.parametrize("broken", ["[INST] {{", "[INST] {{ messages[9].content }}", "[INST] {{ nobody() }}", ""])
def test_a_template_that_does_not_work_does_not_write_v1(broken: str) -> None:
    assert not template_writes_v1(broken, TOKENS)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set x = namespace(s=bos_token) %}{% for i in range(40) %}{% set x.s = x.s + x.s %}{% endfor %}"
FOR_SYSTEM = "{%% if messages[0].role == 'system' %%}%s{%% endif %%}"


@pytest.mark.parametrize("explosion", [ENDLESS, HUGE, "{{ 'a' * 10**10 }}", FOR_SYSTEM % ENDLESS])
def test_a_template_that_explodes_ends_in_time_and_does_not_write_v1(explosion: str) -> None:
    limits, began = RenderLimits(timeout_s=1.0, memory_mib=64), time.monotonic()
    assert template_writes_v1(SECOND, TOKENS, limits=limits)
    assert not template_writes_v1(explosion + SECOND, TOKENS, limits=limits)
    assert time.monotonic() - began < 10  # one probe's second, two children


def test_a_model_whose_template_never_ends_is_told_from_v1_in_seconds(tmp_path: Path) -> None:
    folder, began = write_v1_model(tmp_path), time.monotonic()
    (folder / "chat_template.jinja").write_text(ENDLESS + SECOND)
    assert not is_mixtral_v1(folder)
    assert time.monotonic() - began < 20  # 5 s


@pytest.mark.parametrize(
    ("file", "content", "is_v1"),
    [
        ("chat_template.jinja", SECOND, True),
        ("chat_template.json", {"chat_template": SECOND}, True),
        ("tokenizer_config.json", {"chat_template": SECOND}, True),
        ("tokenizer_config.json", {"chat_template": FINE_TUNED["stripped text"]}, False),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": SECOND}]}, True),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": FINE_TUNED["no BOS"]}]}, False),
        ("tokenizer_config.json", {"chat_template": SECOND, "eos_token": {"content": "</s>"}}, True),
        ("tokenizer_config.json", {"chat_template": SECOND, "eos_token": "<|im_end|>"}, False),
        ("tokenizer_config.json", {"eos_token": "</s>"}, True),  # no template at all: the base model
    ],
)
def test_the_template_is_found_wherever_a_model_keeps_it(tmp_path: Path, file: str, content: Any, is_v1: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_CONFIG))
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    assert is_mixtral_v1(tmp_path) is is_v1


@pytest.mark.parametrize("other", [{"model_type": "mistral"}, {"vocab_size": 32768}])
def test_another_architecture_or_size_is_not_v1(tmp_path: Path, other: dict[str, Any]) -> None:
    folder = write_v1_model(tmp_path)
    assert is_mixtral_v1(folder)
    (folder / "config.json").write_text(json.dumps(MIXTRAL_CONFIG | other))
    assert not is_mixtral_v1(folder)


def test_another_sentencepiece_file_is_not_v1(tmp_path: Path) -> None:
    folder = write_v1_model(tmp_path)
    with (folder / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    assert not is_mixtral_v1(folder)


def test_without_a_sentencepiece_file_the_pieces_decide(hugging_face: Any, tmp_path: Path) -> None:
    hugging_face.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_CONFIG))
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    assert is_mixtral_v1(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    changed, count = re.subn(r'"▁\[":\s*733\b', '"▁[[[[":733', text)
    assert count == 1
    (tmp_path / "tokenizer.json").write_text(changed, encoding="utf-8")
    assert not is_mixtral_v1(tmp_path)
