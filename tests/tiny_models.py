"""Small models, each with its own tokenizer and chat template, for what isn't quite Mixtral 8x7B v0.1 and what isn't at
all; those with weights have random ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline import tiny_mixtral
from pipeline.model import cache_directory
from tests.cluster.real_configs import MIXTRAL_8X7B

MIXTRAL_CONFIG = {"model_type": "mixtral", "vocab_size": 32000}
"""What tells Mixtral 8x7B from other models before its tokenizer is looked at."""
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Mixtral-8x22B-Instruct-v0.1's, without its tools: no space before [INST], which is a control token there.
MIXTRAL_8X22B = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + '[/INST]' }}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}"
    "{%- endfor %}"
)
CORPUS = ["the wind over the harbour", "seven copper lanterns", "question number 1234567890", "system user assistant"]
COMMON = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}


def train_bpe(texts: Iterable[str], special_tokens: Sequence[str]) -> Any:
    """A byte-level BPE of at most 400 ids, of which the special tokens are the first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_chatml_tokenizer(folder: Path, *, template: str | None = CHATML) -> int:
    """A tokenizer made here; returns the vocabulary's size."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_bpe(CORPUS, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return len(fast)


def write_v1_model(folder: Path, template: str = tiny_mixtral.CHAT_TEMPLATE) -> Path:
    """Mixtral 8x7B's tokenizer with this chat template, and a config that says so; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_mixtral._write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text(json.dumps(MIXTRAL_CONFIG))
    return folder


def write_mixtral_v3_tokenizer(folder: Path) -> int:
    """Mixtral 8x22B's own SentencePiece file, out of mistral_common, as a Hugging Face tokenizer."""
    import mistral_common

    write_v1_model(folder, MIXTRAL_8X22B)
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copyfile(data / "mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["[INST]", "[/INST]"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return 32768


def save_random(model_class: str, folder: Path, config: Any) -> Path:
    """Seeded random weights in bfloat16."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(1)
        getattr(transformers, model_class)(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_llama(folder: Path) -> Path:
    """Dense, two layers, ChatML."""
    from transformers import LlamaConfig

    vocab = write_chatml_tokenizer(folder)
    config = LlamaConfig(vocab_size=vocab, intermediate_size=128, num_hidden_layers=2, eos_token_id=2, **COMMON)
    return save_random("LlamaForCausalLM", folder, config)


def make_qwen_moe(folder: Path) -> Path:
    """Qwen3-MoE: a dense layer, then three that route, top 3 of 6 experts, ChatML."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=write_chatml_tokenizer(folder),
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_experts=6,
        num_experts_per_tok=3,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
        norm_topk_prob=True,
        eos_token_id=2,
        **COMMON,
    )
    return save_random("Qwen3MoeForCausalLM", folder, config)


def make_mixtral_8x22b(folder: Path) -> Path:
    """Mixtral with 32,768 ids and control tokens for [INST], as 8x22B has them; two layers."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=write_mixtral_v3_tokenizer(folder),
        intermediate_size=128,
        num_hidden_layers=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        **COMMON,
    )
    return save_random("MixtralForCausalLM", folder, config)


def make_mixtral_8x7b_without_weights(folder: Path) -> Path:
    """What `plan` reads of Mixtral 8x7B: its config's figures and, from `tiny`, its own tokenizer."""
    shutil.copytree(tiny_mixtral.ensure_random_mixtral(cache_directory()), folder)
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"], **MIXTRAL_8X7B}))
    return folder
