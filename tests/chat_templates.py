"""Chat templates of models with Mixtral 8x7B's vocabulary: Mistral's own two, and fine-tunes' that differ a little."""

from __future__ import annotations

from pipeline.tiny_mixtral import CHAT_TEMPLATE as SECOND

# What Mixtral 8x7B was published with: no space before a turn, no `system`.
FIRST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
OFFICIAL = {"first": FIRST, "second": SECOND}


def _changed(template: str, old: str, new: str) -> str:
    assert old in template
    return template.replace(old, new)


FINE_TUNED = {
    "no space inside the markers": _changed(_changed(FIRST, "[INST] ", "[INST]"), " [/INST]", "[/INST]"),
    "stripped text": _changed(SECOND, 'message["content"]', 'message["content"] | trim'),
    "line break after BOS": _changed(SECOND, "{{- bos_token }}", "{{- bos_token }}{{- '\\n' }}"),
    "line break before the answer": _changed(SECOND, '" [/INST]"', '" [/INST]\\n"'),
    "answers without an end": _changed(SECOND, " + eos_token", ""),
    "BOS before every question": _changed(FIRST, "'[INST] '", "bos_token + '[INST] '"),
    "no BOS": _changed(SECOND, "{{- bos_token }}", ""),
    "system in a block": _changed(SECOND, 'system_message + "', '"<<SYS>>" + system_message + "<</SYS>>'),
    "system before the last question": _changed(SECOND, "loop.first", "loop.last"),
    "system left out": _changed(SECOND, 'system_message + "\\n\\n" + ', ""),
    "space to begin the answer": SECOND + "{%- if add_generation_prompt %}{{- ' ' }}{%- endif %}",
    "refuses an answer": _changed(SECOND, '" " + message["content"] + eos_token', "raise_exception('one question')"),
}
"""Each still has `[INST]` in it, and is told from Mistral's by at least one of a few short chats."""
