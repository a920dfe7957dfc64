"""Puts the two embedded models together: real Mixtrals (4 layers, 8 experts, top 2), tiny, with Mixtral's tokenizer.

`tiny` is trained (its card: pipeline/tiny/README.md) and answers a few kinds of question right. `random` has random
weights, made in seconds: its text is noise and never stops by itself. Neither needs a network; tokens, routing and
every code path are those of the big one. The tokenizer is mistral_common's, so that it need not be shipped twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

TRAINED = Path(__file__).with_name("tiny")
TRAINED_FILES = ("config.json", "generation_config.json", "model.safetensors")
VERSION = "1"
"""Of the random weights; the trained ones' version is their content."""
SEED = 8 * 7

# Mixtral-8x7B-Instruct-v0.1's template, with the system message folded into the first user turn.
CHAT_TEMPLATE = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with an optional initial system message") }}
    {%- endif %}
{%- endfor %}
"""


def ensure_tiny_mixtral(cache: Path) -> Path:
    """Return the trained model's directory under `cache`, making it first when it isn't there.

    Guarantees:
    - the directory is complete or absent; processes that race make it once or harmlessly replace nothing.
    - other weights are another directory.
    """
    version = hashlib.sha256((TRAINED / "model.safetensors").read_bytes()).hexdigest()[:12]
    return _ensure(cache / f"tiny-mixtral-{version}", _copy_trained)


def ensure_random_mixtral(cache: Path) -> Path:
    """As `ensure_tiny_mixtral`, with random weights: the same version of this file always makes the same ones."""
    return _ensure(cache / f"random-mixtral-{VERSION}", _write_weights)


def _ensure(target: Path, write_model: Callable[[Path], None]) -> Path:
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_tokenizer(temporary)
        write_model(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first, and its copy is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _copy_trained(folder: Path) -> None:
    for name in TRAINED_FILES:
        shutil.copyfile(TRAINED / name, folder / name)


def _write_tokenizer(folder: Path) -> None:
    import mistral_common

    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copyfile(source, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_weights(folder: Path) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        # At the default 0.02 the logits are nearly flat and greedy decoding hangs on rounding; 0.2 separates them.
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
