"""In what an engine holds a model: arithmetic, quantization of its matrices, KV cache; and the bytes of each.

Pure. A quantization scheme that isn't known here is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SpecError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Quantization:
    """A scheme that stores matrices in fewer bits; one scale and one zero point per group of weights."""

    name: str
    bits: int
    group_size: int | None = None
    """Weights per scale; None for one scale per matrix or channel, which is not worth counting."""

    @property
    def bytes_per_weight(self) -> float:
        """Groups of 128 at 4 bits come to 4.16 bits: 24.65 GB for Mixtral 8x7B."""
        group = (_SCALE_BYTES + self.bits / 8) / self.group_size if self.group_size else 0.0
        return self.bits / 8 + group


FP8 = Quantization("fp8", 8)
AWQ = Quantization("awq", 4, 128)
GPTQ = Quantization("gptq", 4, 128)
_SCHEMES = {scheme.name: scheme for scheme in (FP8, AWQ, GPTQ)}


@dataclass(frozen=True, slots=True)
class Precision:
    """In what an engine holds weights, activations and KV cache."""

    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    kv_cache_fp8: bool = False

    def __str__(self) -> str:
        return self.quantization.name if self.quantization else self.dtype

    @property
    def wide_bytes(self) -> int:
        """Bytes of an activation, and of a weight that no scheme touches."""
        return DTYPE_BYTES[self.dtype]

    @property
    def matrix_bytes(self) -> float:
        """Bytes of a weight in the attention, MLP and expert matrices."""
        return self.quantization.bytes_per_weight if self.quantization else self.wide_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of one number in the KV cache."""
        return 1 if self.kv_cache_fp8 else self.wide_bytes


def model_precision(config: Mapping[str, Any], *, dtype: str, engine_args: Mapping[str, Any]) -> Precision:
    """What vLLM would load a model in, from its `config.json`, `model.dtype` and the engine's arguments.

    `auto` is the checkpoint's dtype, but bfloat16 for float32 ones, as vLLM does where bfloat16 exists.

    Raises:
        SpecError: the checkpoint is quantized, or is to be, by a scheme whose size isn't known here.
    """
    config = {**config, **(config.get("text_config") or {})}
    if dtype == "auto":
        stored = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        dtype = stored if stored in ("float16", "bfloat16") else "bfloat16"
    stored_scheme, requested = config.get("quantization_config"), engine_args.get("quantization")
    quantization: Quantization | None = None
    if stored_scheme:
        quantization = _stored_scheme(stored_scheme)
    elif requested:
        quantization = _scheme(str(requested), bits=None, group_size=None)
    kv_cache_fp8 = str(engine_args.get("kv_cache_dtype")).startswith("fp8")
    return Precision(dtype=dtype, quantization=quantization, kv_cache_fp8=kv_cache_fp8)


def _stored_scheme(stored: Mapping[str, Any]) -> Quantization:
    """`quantization_config` of a checkpoint."""
    method = str(stored.get("quant_method"))
    if method != "compressed-tensors":
        return _scheme(method, bits=stored.get("bits"), group_size=stored.get("group_size"))
    for group in (stored.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("num_bits"):
            bits = int(weights["num_bits"])
            name = FP8.name if bits == FP8.bits and weights.get("type") == "float" else method
            return Quantization(name, bits, weights.get("group_size") if bits < FP8.bits else None)
    raise _unknown(method)


def _scheme(name: str, *, bits: int | None, group_size: int | None) -> Quantization:
    """`awq_marlin` and `gptq_marlin` are awq and gptq with other kernels; `fp8_per_tensor` and the like are fp8."""
    known = _SCHEMES.get(name.split("_", maxsplit=1)[0])
    if known is None:
        raise _unknown(name)
    if known is FP8:
        return FP8
    group = known.group_size if group_size is None else group_size
    return Quantization(known.name, bits or known.bits, group if group and group > 0 else None)


def _unknown(name: str) -> SpecError:
    return SpecError(
        f"quantization {name!r}: its bytes per weight aren't known here, so no GPUs can be planned for it; give "
        f"tensor_parallel yourself (planned are {', '.join(_SCHEMES)} and compressed-tensors of known bits)"
    )
