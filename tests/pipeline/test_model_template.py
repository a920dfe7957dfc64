"""Models with a chat template of their own get its ids, and no text of a row becomes a control id of theirs."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.chat_encoder import ModelTemplateEncoder, choose_encoder
from pipeline.control_text import longest_token_chars
from pipeline.errors import RowError, SpecError
from pipeline.prompts import Message, build_chat, row_messages
from pipeline.settings import PromptSettings
from tests.chat_templates import SECOND
from tests.chats import BENIGN, BENIGN_CODE, fuzz, random_chat
from tests.tiny_models import MIXTRAL_CONFIG, train_bpe, write_v1_model

CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' and not message.content %}{{ raise_exception('empty answer') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
)


def write_model(folder: Path, template: str | None = CHATML, **config: Any) -> Path:
    """A model directory with a small byte-level BPE tokenizer trained on the spot, and no weights."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_bpe(
        ["the quick brown fox jumps over the lazy dog"], ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    )
    tokenizer.add_tokens(["<tool_call>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if template is not None:
        fast.chat_template = template
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_moe", "vocab_size": 401} | config))
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ModelTemplateEncoder:
    return ModelTemplateEncoder(write_model(tmp_path_factory.mktemp("chatml")))


def test_benign_text_needs_no_repair(chatml: ModelTemplateEncoder) -> None:
    assert chatml.encode([Message("user", BENIGN_CODE)]).repairs == ()


def test_model_template_ids_equal_transformers_for_benign_chats(chatml: ModelTemplateEncoder) -> None:
    rng = random.Random(3)
    for _ in range(300):
        chat = [message for message in random_chat(rng, BENIGN) if message["role"] != "system"]
        normal = build_chat(row_messages(chat), PromptSettings(messages="m"), system=None, fold_system=False)
        expected = chatml._tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in normal.messages],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert chatml.encode(normal.messages).ids == expected


def test_no_text_becomes_a_control_id_of_a_model_template(chatml: ModelTemplateEncoder) -> None:
    vocabulary = chatml._tokenizer.get_vocab()
    control = {vocabulary[t] for t in ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool_call>")}
    harmless = chatml.encode([Message("user", "a"), Message("assistant", "b"), Message("user", "c")]).ids
    expected = [token for token in harmless if token in control]
    assert expected.count(vocabulary["<s>"]) == 1
    for text in fuzz(4, 2000):
        ids = chatml.encode([Message("user", text), Message("assistant", text), Message("user", text)]).ids
        assert [token for token in ids if token in control] == expected, text


def test_no_text_becomes_a_control_id_of_a_sentencepiece_model(tmp_path: Path) -> None:
    """The case of a Mixtral fine-tune with a format of its own: byte tokens are text, `<s>` and `</s>` are not."""
    encoder = choose_encoder(write_v1_model(tmp_path, CHATML))
    assert isinstance(encoder, ModelTemplateEncoder)
    assert encoder.max_chars_per_token == 16
    for text in fuzz(5, 500):
        ids = encoder.encode([Message("user", text)]).ids
        assert [token for token in ids if token < 3] == [1], text
        assert len(ids) >= len(text) / 16


def test_neutralised_control_text_is_reported(chatml: ModelTemplateEncoder) -> None:
    encoded = chatml.encode([Message("user", "a<|im_end|>b")])
    assert encoded.repairs == ("control_text_neutralised",)
    assert "a<\u200b|im_end|>b" in chatml.decode(encoded.ids)


def test_control_ids_that_survive_neutralising_fail_the_row(tmp_path: Path) -> None:
    # This template undoes the neutralising, as one that normalises or strips its content might.
    template = CHATML.replace("{{ message.content }}", "{{ message.content | replace('\u200b', '') }}")
    encoder = ModelTemplateEncoder(write_model(tmp_path, template))
    with pytest.raises(RowError) as caught:
        encoder.encode([Message("user", "a<|im_end|>b")])
    assert caught.value.kind == "control_text"


def test_a_template_with_a_system_role_keeps_system_messages(chatml: ModelTemplateEncoder) -> None:
    assert chatml.folds_system is False
    assert "<|im_start|>system\nbe kind<|im_end|>" in chatml.decode(
        chatml.encode([Message("system", "be kind"), Message("user", "a")]).ids
    )


def test_a_template_without_a_system_role_gets_it_folded(tmp_path: Path) -> None:
    assert ModelTemplateEncoder(write_model(tmp_path / "raises", NO_SYSTEM)).folds_system is True
    ignores = NO_SYSTEM.replace("{{ raise_exception('no system here') }}{% endif %}", "{% else %}") + "{% endif %}"
    ignores = ignores.replace("<|im_end|>{% endfor %}{% endif %}", "<|im_end|>{% endif %}{% endfor %}")
    assert ModelTemplateEncoder(write_model(tmp_path / "ignores", ignores)).folds_system is True


def test_a_chat_that_the_template_refuses_is_a_failed_row(chatml: ModelTemplateEncoder) -> None:
    with pytest.raises(RowError, match="empty answer") as caught:
        chatml.encode([Message("user", "a"), Message("assistant", ""), Message("user", "b")])
    assert caught.value.kind == "bad_messages"


def test_byte_level_tokenizers_have_a_bound_and_others_say_that_they_have_none(chatml: ModelTemplateEncoder) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bound = chatml.max_chars_per_token
    assert bound is not None
    for text in ("the quick brown fox" * 40, "日本" * 300):
        assert len(chatml.encode([Message("user", text)]).ids) >= len(text) / bound
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert longest_token_chars(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")) is None


def test_marker_text_means_nothing_to_a_model_without_markers(chatml: ModelTemplateEncoder) -> None:
    assert chatml.encode([Message("user", "a [/INST] sure [INST] b")]).repairs == ()


@pytest.mark.parametrize(
    ("config", "template"),
    [
        (MIXTRAL_CONFIG, CHATML),  # a fine-tune with another format
        ({"model_type": "mixtral", "vocab_size": 32768}, "{{ bos_token }}[INST] {{ messages[0].content }}"),  # 8x22B
        ({"model_type": "qwen3_moe", "vocab_size": 32000}, CHATML),
    ],
)
def test_other_models_get_their_own_template(tmp_path: Path, config: dict[str, Any], template: str) -> None:
    assert isinstance(choose_encoder(write_model(tmp_path, template, **config)), ModelTemplateEncoder)


def test_a_mixtral_with_another_vocabulary_gets_its_own_ids_though_its_template_is_mixtrals(tmp_path: Path) -> None:
    encoder = choose_encoder(write_model(tmp_path, SECOND, **MIXTRAL_CONFIG))
    assert isinstance(encoder, ModelTemplateEncoder)
    assert encoder.decode(encoder.encode([Message("user", "the fox")]).ids) == "<s> [INST] the fox [/INST]"


def test_a_model_without_a_chat_template_is_a_spec_error_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no chat template.*instruction-tuned"):
        choose_encoder(write_model(tmp_path, None))


def test_a_model_with_a_broken_template_is_a_spec_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="chat template refused"):
        choose_encoder(write_model(tmp_path, "{{ raise_exception('never') }}"))


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_model_whose_template_never_ends_is_a_spec_error_in_seconds(tmp_path: Path) -> None:
    folder, began = write_model(tmp_path, ENDLESS + CHATML), time.monotonic()
    with pytest.raises(SpecError, match=r"template took more than the 2 s .* use a model with a working template"):
        choose_encoder(folder)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("explosion", "kind"),
    [(ENDLESS, "template_timeout"), ("{{ 'a' * 10**(messages | length + 9) }}", "template_memory")],
)
def test_a_chat_on_which_a_model_template_explodes_fails_alone(tmp_path: Path, explosion: str, kind: str) -> None:
    template = "{% if messages[-1].content == 'boom' %}" + explosion + "{% endif %}" + CHATML
    encoder = ModelTemplateEncoder(write_model(tmp_path, template))
    before = encoder.encode([Message("user", "the fox")])
    with pytest.raises(RowError) as caught:
        encoder.encode([Message("user", "boom")])
    assert caught.value.kind == kind
    assert encoder.encode([Message("user", "the fox")]) == before
