"""Parameters counted from a config are those that transformers allocates; bytes and FLOPs follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.model_size import FAMILIES, ModelSize, model_size
from cluster.precision import AWQ, FP8, Precision
from pipeline.errors import SpecError
from pipeline.model import read_config
from pipeline.tiny_mixtral import ensure_random_mixtral
from tests.cluster.real_configs import LLAMA_3_8B, MIXTRAL_8X7B, MIXTRAL_8X22B, QWEN3_30B_A3B
from tests.tiny_models import make_llama, make_mixtral_8x22b, make_qwen_moe

BF16 = Precision()
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 48, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 32}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 24}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 80}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 80, "qkv_bias": False, "mlp_only_layers": [1]}),
    ("qwen3_moe", {**EXPERTS, "head_dim": 16}),
    ("qwen3_moe", {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 2}),
    ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "attention_bias": True}),
]


def transformers_counts(config: Any) -> int:
    """Parameters of the model that transformers builds, without memory for them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def stored_parameters(folder: Path) -> int:
    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        for shape in shapes:
            product = 1
            for side in shape:
                product *= side
            count += product
    return count


@pytest.mark.parametrize(("family", "extra"), SHAPES)
def test_parameters_are_what_transformers_allocates(family: str, extra: dict[str, Any]) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **SMALL | extra)
    assert model_size(config.to_dict()).num_parameters == transformers_counts(config)


def test_every_known_family_is_checked_against_transformers() -> None:
    assert {family for family, _ in SHAPES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (MIXTRAL_8X7B, 46_702_792_704),
        (MIXTRAL_8X22B, 140_630_071_296),
        (LLAMA_3_8B, 8_030_261_248),
        (QWEN3_30B_A3B, 30_532_122_624),
    ],
    ids=["mixtral-8x7b", "mixtral-8x22b", "llama-3-8b", "qwen3-30b-a3b"],
)
def test_published_models_have_their_published_size(config: dict[str, Any], parameters: int) -> None:
    from transformers import AutoConfig

    assert model_size(config).num_parameters == parameters
    fields = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    assert transformers_counts(AutoConfig.for_model(config["model_type"], **fields)) == parameters


@pytest.mark.parametrize(
    "make", [ensure_random_mixtral, make_llama, make_qwen_moe, make_mixtral_8x22b], ids=lambda make: make.__name__
)
def test_models_on_disk_hold_what_their_config_says(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert model_size(read_config(folder / "config.json")).num_parameters == stored_parameters(folder)


def test_a_token_of_mixtral_uses_two_of_eight_experts() -> None:
    # 46,702,792,704 - 6/8 of the experts' 32 x 8 x 3 x 4096 x 14336 = 45,097,156,608
    assert model_size(MIXTRAL_8X7B).num_active_parameters == 46_702_792_704 - 33_822_867_456 == 12_879_925_248


def test_an_unknown_family_is_refused_not_guessed() -> None:
    with pytest.raises(SpecError, match=r"'deepseek_v3'.*give tensor_parallel yourself \(planned are mixtral, "):
        model_size(MIXTRAL_8X7B | {"model_type": "deepseek_v3"})


@pytest.mark.parametrize(
    ("precision", "gigabytes"),
    [
        (BF16, 93.41),  # 46,702,792,704 x 2
        (Precision("float32"), 186.81),
        # Experts and attention, 46,439,333,888, in 8 or 4.16 bits; embeddings, routers and norms, 263,458,816, in 16
        (Precision(quantization=FP8), 46.97),
        (Precision(quantization=AWQ), 24.65),
    ],
    ids=str,
)
def test_routers_embeddings_and_norms_stay_in_16_bits_under_every_scheme(
    precision: Precision, gigabytes: float
) -> None:
    assert model_size(MIXTRAL_8X7B).weight_bytes(precision) / 1e9 == pytest.approx(gigabytes, abs=0.005)


@pytest.mark.parametrize("tensor_parallel", [2, 4, 8])
def test_tensor_parallel_gpus_hold_the_model_once_but_for_routers_and_norms(tensor_parallel: int) -> None:
    size = model_size(MIXTRAL_8X7B)
    together = tensor_parallel * size.weight_bytes(BF16, tensor_parallel=tensor_parallel)
    assert together == size.weight_bytes(BF16) + (tensor_parallel - 1) * size.replicated * 2


def test_more_gpus_than_kv_heads_hold_copies_of_keys_and_values() -> None:
    size = model_size(QWEN3_30B_A3B)  # 4 KV heads
    kv_bytes = {tp: size.kv_bytes_per_token(BF16, tensor_parallel=tp) for tp in (1, 2, 4, 8)}
    assert kv_bytes == {1: 98_304, 2: 49_152, 4: 24_576, 8: 24_576}
    on_eight, on_four = (tp * size.weight_bytes(BF16, tensor_parallel=tp) for tp in (8, 4))
    assert on_eight - on_four == 2 * (size.k_and_v + 4 * size.replicated)


def test_kv_cache_of_a_mixtral_token() -> None:
    size = model_size(MIXTRAL_8X7B)  # keys and values x 32 layers x 8 heads x 128 dimensions x 2 bytes
    assert size.kv_bytes_per_token(BF16) == 2 * 32 * 8 * 128 * 2 == 131_072
    assert size.kv_bytes_per_token(BF16, tensor_parallel=8) == 16_384
    assert size.kv_bytes_per_token(Precision(kv_cache_fp8=True)) == 65_536


def test_a_batch_reads_the_experts_it_touches() -> None:
    size = model_size(MIXTRAL_8X7B)
    wide = 2 * (size.num_parameters - size.experts - size.embedding)
    experts = {batch: size.streamed_bytes(BF16, tensor_parallel=1, batch=batch) - wide for batch in (1, 4, 16, 512)}
    share = {batch: count / (2 * size.experts) for batch, count in experts.items()}
    # 1 - 0.75^B of 8 experts: 2.0, 5.5, 7.9 and 8.0 of them
    assert share == pytest.approx({1: 0.25, 4: 0.684, 16: 0.990, 512: 1.0}, abs=0.001)


def test_a_tied_embedding_is_read_as_the_output_projection_that_it_is() -> None:
    tied: ModelSize = model_size(LLAMA_3_8B | {"tie_word_embeddings": True})
    untied = model_size(LLAMA_3_8B)
    assert tied.num_parameters == untied.num_parameters - untied.embedding
    both = [size.streamed_bytes(BF16, tensor_parallel=1, batch=1) for size in (tied, untied)]
    assert both[0] == both[1]
    assert tied.flops_per_token(context=0) == untied.flops_per_token(context=0)


def test_flops_are_two_per_weight_and_four_per_attended_position() -> None:
    size = model_size(MIXTRAL_8X7B)
    assert size.flops_per_token(context=0) == 2 * (12_879_925_248 - 32000 * 4096)
    per_position = size.flops_per_token(context=1) - size.flops_per_token(context=0)
    assert per_position == 4 * 32 * 32 * 128
