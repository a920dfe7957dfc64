"""A model's own template sees what transformers would show it, and can neither stall nor swell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.chat_template import ChatTemplate
from pipeline.errors import RowError
from pipeline.jinja_process import RenderLimits
from pipeline.prompts import Message

TOKENS = {"bos_token": "<s>", "additional_special_tokens": ["<a>", "<b>"]}
CHAT = [Message("system", "grüße 日本"), Message("user", "<a & 'b'>\n"), Message("assistant", ""), Message("user", "d")]
EXOTIC = (
    "{{ bos_token }}{{ additional_special_tokens[1] }}{{ strftime_now('%Y') }}{{ messages | tojson(indent=1) }}\n"
    "  {% for message in messages %}\n"
    "  {% if message.role == 'assistant' %}{% generation %}[{{ message.content }}]{% endgeneration %}{% continue %}\n"
    "  {% endif %}{{ message.content }}{{ message.nothing }}{% endfor %}"
    "{{ tools is none }}{{ documents is none }}{{ unknown is defined }}{{ add_generation_prompt }}"
)


def test_the_transformers_dialect_renders_what_apply_chat_template_renders(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "<a>": 1, "<b>": 2}, unk_token="<s>")),
        bos_token="<s>",
        additional_special_tokens=["<a>", "<b>"],
    )
    tokenizer.chat_template = EXOTIC.replace("additional_special_tokens[1]", "bos_token")
    chat = [{"role": message.role, "content": message.content} for message in CHAT]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    with ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map, dialect="transformers") as template:
        assert template.render(CHAT) == expected
    with ChatTemplate(EXOTIC, TOKENS, dialect="transformers") as template:
        assert template.render(CHAT) == expected.replace("<s><s>", "<s><b>", 1)


@pytest.mark.parametrize("dialect", ["plain", "transformers"])
@pytest.mark.parametrize(
    ("explosion", "kind"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "template_timeout"),
        ("{{ 'a' * 10**(messages | length + 9) }}", "template_memory"),
        ("{{ 'a' * 9_000_000 }}", "template_output_too_big"),
        ("{{ raise_exception('no') }}", "template_error"),
        ("{{ ''.__class__.__mro__ }}", "template_error"),
    ],
)
def test_a_chat_that_passes_a_limit_fails_alone(dialect: Any, explosion: str, kind: str) -> None:
    text = "{% if messages[0].content == 'boom' %}" + explosion + "{% endif %}{{ messages[0].content }}"
    with ChatTemplate(text, {}, dialect=dialect, limits=RenderLimits(timeout_s=0.5)) as template:
        for _ in range(2):
            with pytest.raises(RowError) as caught:
                template.render([Message("user", "boom")])
            assert caught.value.kind == kind
            assert template.render([Message("user", "fine")]) == "fine"


def test_a_dropped_chat_template_leaves_no_process() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, dialect="plain")
    assert template.render([Message("user", "a")]) == "a"
    pid = template._child._process.pid  # type: ignore[union-attr]
    del template
    assert not Path(f"/proc/{pid}").exists()
