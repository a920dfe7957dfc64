"""What vLLM would load a model in, read off its config and the engine's arguments."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.precision import AWQ, FP8, GPTQ, Precision, Quantization, model_precision
from pipeline.errors import SpecError
from tests.cluster.real_configs import MIXTRAL_8X7B


def precision(stored: dict[str, Any] | None = None, *, dtype: str = "bfloat16", **engine_args: Any) -> Precision:
    config = MIXTRAL_8X7B | ({"quantization_config": stored} if stored else {})
    return model_precision(config, dtype=dtype, engine_args=engine_args)


@pytest.mark.parametrize(
    ("stored", "engine_args", "expected"),
    [
        (None, {}, None),
        (None, {"quantization": "fp8"}, FP8),
        (None, {"quantization": "fp8_per_block"}, FP8),
        ({"quant_method": "fp8", "activation_scheme": "static"}, {}, FP8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, {"quantization": "awq_marlin"}, AWQ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {}, GPTQ),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, {}, Quantization("gptq", 8, 32)),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, {}, Quantization("gptq", 4, None)),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            {},
            FP8,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 64}}},
            },
            {},
            Quantization("compressed-tensors", 4, 64),
        ),
    ],
)
def test_scheme_of_a_model(
    stored: dict[str, Any] | None, engine_args: dict[str, Any], expected: Quantization | None
) -> None:
    assert precision(stored, **engine_args).quantization == expected


@pytest.mark.parametrize(
    ("stored", "engine_args"),
    [
        ({"quant_method": "bitsandbytes"}, {}),
        ({"quant_method": "compressed-tensors"}, {}),
        (None, {"quantization": "x"}),
    ],
)
def test_an_unknown_scheme_is_refused_not_guessed(stored: dict[str, Any] | None, engine_args: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"bytes per weight aren't known here.*give tensor_parallel yourself"):
        precision(stored, **engine_args)


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float16", "float16"),
        ("auto", "torch.float16", "float16"),
        ("auto", "float32", "bfloat16"),
        ("auto", None, "bfloat16"),
        ("float16", "bfloat16", "float16"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_auto_is_the_dtype_of_the_checkpoint(asked: str, stored: str | None, expected: str) -> None:
    config = MIXTRAL_8X7B | {"torch_dtype": stored}
    assert model_precision(config, dtype=asked, engine_args={}).dtype == expected


def test_kv_cache_in_fp8_takes_half() -> None:
    assert precision().kv_bytes == 2
    assert precision(kv_cache_dtype="auto").kv_bytes == 2
    assert precision(kv_cache_dtype="fp8_e4m3").kv_bytes == 1


def test_four_bits_with_a_scale_and_a_zero_point_per_128_weights() -> None:
    assert AWQ.bytes_per_weight * 8 == 4 + (16 + 4) / 128
    assert FP8.bytes_per_weight == 1
