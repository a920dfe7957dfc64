"""Mixtrals with random weights for measurements: one in which the pipeline shows, one in which the engine dominates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
    "139m": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8},
}


def make_model(name: str, folder: Path) -> Path:
    """Write the model, with Mixtral's tokenizer, unless it is there; returns its folder."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from pipeline import tiny_mixtral

    folder.mkdir(parents=True, exist_ok=True)
    tiny_mixtral._write_tokenizer(folder)
    config = MixtralConfig(
        vocab_size=32000,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        **MODELS[name],
    )
    torch.manual_seed(1)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
