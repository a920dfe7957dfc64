"""Small models with random weights, each with its own tokenizer and chat template: what isn't Mixtral 8x7B v0.1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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


def write_chatml_tokenizer(folder: Path, *, template: str | None = CHATML) -> int:
    """A byte-level BPE of a few hundred ids, made here; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return len(fast)


def write_mixtral_v3_tokenizer(folder: Path) -> int:
    """Mixtral 8x22B's own SentencePiece file, out of mistral_common, as a Hugging Face tokenizer."""
    import mistral_common

    data = Path(mistral_common.__file__).parent / "data"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / "mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "legacy": False,
        "additional_special_tokens": ["[INST]", "[/INST]"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(MIXTRAL_8X22B)
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
