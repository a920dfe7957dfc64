"""GPU types: memory, speed, dtypes and Ray label of each, with its source. Users add their own in the spec.

Knows nothing of models. Figures are per GPU. Speeds are the vendor's peaks, dense (NVIDIA's datasheets print most of
theirs with 2:4 sparsity: halved here); memory is what the driver leaves of the name's gigabytes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from cluster.precision import Precision
from pipeline.errors import SpecError
from pipeline.settings import Settings

CPU = "cpu"

_BFLOAT16_FROM = 8.0
"""vllm/platforms/cuda.py, supported_dtypes."""
_FP8_FROM = 7.5
"""vLLM's Fp8Config.get_min_capability. Below 8.9 such weights are multiplied in 16 bits: smaller, not faster."""
_FLOAT32_SLOWDOWN = 16
"""Peak in 16 bits over peak in float32: 16 on A100, 15 on H100, less on others."""


class GpuType(Settings):
    """What there is to know of one kind of GPU."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
    """What `fleet.pools[].gpu` says."""
    vendor: Literal["nvidia", "amd", "cpu"] = "nvidia"
    """Decides which quantization schemes and dtypes there are."""
    memory_gib: Annotated[float, Field(gt=0, le=4096, allow_inf_nan=False)]
    """Total memory as `torch.cuda.mem_get_info()` gives it, in GiB: an 80 GB A100 has 79.15."""
    memory_gb_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Peak memory bandwidth, in 10^9 bytes per second."""
    tflops: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Peak of dense 16-bit matrix products with 32-bit sums, in 10^12 operations per second."""
    fp8_tflops: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The same in FP8; null where FP8 weights are multiplied in 16 bits."""
    compute_capability: float | None = None
    """NVIDIA's, e.g. 8.0: bfloat16 needs 8.0. Null is taken to do everything."""
    link: Literal["nvlink", "infinity_fabric", "pcie", "none"] = "pcie"
    """What connects the GPUs of one node."""
    link_gb_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Peak from one GPU to the others of its node, one direction, in 10^9 bytes per second."""
    ray_labels: list[str] = Field(default=[])
    """Values of the node label `ray.io/accelerator-type` that mean this type; its own name always does."""
    labelled_by_ray: bool = True
    """Whether Ray finds such a label by itself; else whoever starts the node must set it."""
    source: str = "the spec"
    """Where the figures are from."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All values of the node label that mean this type."""
        return () if self.name == CPU else tuple(dict.fromkeys((self.name, *self.ray_labels)))


_Link = tuple[Literal["nvlink", "infinity_fabric", "pcie", "none"], float]
_NVLINK_3: _Link = ("nvlink", 300)
_NVLINK_4: _Link = ("nvlink", 450)
_NVLINK_5: _Link = ("nvlink", 900)
_PCIE_3: _Link = ("pcie", 15.8)
_PCIE_4: _Link = ("pcie", 31.5)

_Row = tuple[str, float, float, float, float | None, float | None, _Link, str]
# Memory: the lowest total seen in torch's out-of-memory messages in public logs; it varies by 1% with driver and ECC.
# nvidia-smi shows 0.4 to 2 GiB more, which no process gets. FP8 is null where FP8 weights are multiplied in 16 bits.
_NVIDIA: list[_Row] = [
    # name, memory GiB, GB/s, TFLOP/s, FP8 TFLOP/s, compute capability, link, source
    ("A100-40G", 39.38, 1555, 312, None, 8.0, _NVLINK_3, "NVIDIA A100 datasheet 2021, SXM"),
    ("A100-80G", 79.15, 2039, 312, None, 8.0, _NVLINK_3, "NVIDIA A100 datasheet 2021, SXM; PCIe has 1,935 GB/s"),
    ("H100-80G", 79.10, 3350, 989.5, 1979, 9.0, _NVLINK_4, "NVIDIA H100 datasheet, SXM"),
    ("H100-NVL", 93.02, 3900, 835.5, 1670.5, 9.0, _NVLINK_3, "NVIDIA H100 datasheet, NVL; NVLink joins pairs only"),
    ("H200", 139.72, 4800, 989.5, 1979, 9.0, _NVLINK_4, "NVIDIA H200 datasheet, SXM"),
    ("B200", 178.35, 7672, 2250, 4500, 10.0, _NVLINK_5, "NVIDIA DGX B200 datasheet; bandwidth: pytorch/ao#4002"),
    ("L4", 22.03, 300, 121, 242.5, 8.9, _PCIE_4, "NVIDIA L4 datasheet"),
    ("L40S", 44.39, 864, 362, 733, 8.9, _PCIE_4, "NVIDIA L40S datasheet"),
    ("A10G", 22.03, 600, 70, None, 8.6, _PCIE_4, "AWS A10G datasheet 2022"),
    ("T4", 14.56, 320, 65, None, 7.5, _PCIE_3, "NVIDIA T4 datasheet"),
    ("RTX-4090", 23.51, 1008, 165.2, 330.3, 8.9, _PCIE_4, "NVIDIA Ada GPU architecture whitepaper 2.1, appendix A"),
    ("RTX-A6000", 47.40, 768, 154.8, None, 8.6, _PCIE_4, "NVIDIA RTX A6000 datasheet; without the NVLink bridge"),
]
# A type's own name is a label that operators may set. Ray makes one of the device's name, which says A100 and H100
# for every kind of them: nodes with A100s or H100 NVLs must be labelled by hand; H100 alone is taken for the SXM one,
# which has the least memory.
_RAYS_OWN_LABELS = {
    "H100-80G": ["H100"],
    "RTX-4090": ["GeForce-RTX-4090"],
    "MI300X": ["AMD-Instinct-MI300X-OAM", "AMD-Instinct-MI300X-HF"],
}
_LABELLED_BY_HAND = ("A100-40G", "A100-80G", "H100-NVL")


def _nvidia(row: _Row) -> GpuType:
    name, memory_gib, memory_gb_per_s, tflops, fp8_tflops, capability, (link, link_gb_per_s), source = row
    return GpuType(
        name=name,
        memory_gib=memory_gib,
        memory_gb_per_s=memory_gb_per_s,
        tflops=tflops,
        fp8_tflops=fp8_tflops,
        compute_capability=capability,
        link=link,
        link_gb_per_s=link_gb_per_s,
        ray_labels=[name, *_RAYS_OWN_LABELS.get(name, [])],
        labelled_by_ray=name not in _LABELLED_BY_HAND,
        source=source,
    )


_MI300X = GpuType(
    name="MI300X",
    vendor="amd",
    memory_gib=191.69,
    memory_gb_per_s=5300,
    tflops=1307.4,
    fp8_tflops=2614.9,
    link="infinity_fabric",
    link_gb_per_s=448,
    ray_labels=["MI300X", *_RAYS_OWN_LABELS["MI300X"]],
    source="AMD Instinct MI300X datasheet; 7 links of 64 GB/s",
)
_CPU = GpuType(
    name=CPU,
    vendor="cpu",
    memory_gib=64,
    memory_gb_per_s=205,
    tflops=2,
    link="none",
    ray_labels=[],
    source="nominal: a socket with eight channels of DDR4-3200; for orders of magnitude only",
)
GPU_TYPES = {gpu.name: gpu for gpu in [*map(_nvidia, _NVIDIA), _MI300X, _CPU]}


def gpu_type(name: str, custom: Iterable[GpuType] = ()) -> GpuType:
    """Return the type of this name; the user's own come first.

    Raises:
        SpecError: there is none, with the nearest names.
    """
    known = GPU_TYPES | {gpu.name: gpu for gpu in custom}
    if name in known:
        return known[name]
    raise SpecError(f"gpu {name!r} is no GPU type known here. {nearest_types(name, known)}")


def nearest_types(name: str, known: Iterable[str]) -> str:
    """The cure for a type that isn't known: what was probably meant, what there is, and how to add one."""
    folded = {each.casefold(): each for each in known}
    near = [each for each in folded if each.startswith(name.casefold())] if name else []
    near = near or difflib.get_close_matches(name.casefold(), folded, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(folded[each] for each in near)}? " if near else ""
    return (
        f"{hint}Known are {', '.join(sorted(folded.values()))}; or describe yours in fleet.gpu_types: "
        "name, memory_gib, memory_gb_per_s, tflops"
    )


def precision_problem(gpu: GpuType, precision: Precision) -> str | None:
    """Why this GPU can't run a model held like this, with the cure; None when it can."""
    capability = gpu.compute_capability
    if precision.dtype == "bfloat16" and capability is not None and capability < _BFLOAT16_FROM:
        return (
            f"{gpu.name} can't compute in bfloat16: its compute capability is {capability}, bfloat16 needs "
            f"{_BFLOAT16_FROM}; set model.dtype: float16, or use another GPU"
        )
    quantization = precision.quantization
    if quantization is None or quantization.name != "fp8":
        return None
    if gpu.vendor == "cpu":
        return "cpu can't hold FP8 weights: vLLM's CPU build has no kernels for them; leave quantization out"
    if capability is not None and capability < _FP8_FROM:
        return (
            f"{gpu.name} can't hold FP8 weights: its compute capability is {capability}, vLLM's kernels need "
            f"{_FP8_FROM}; use an AWQ or GPTQ checkpoint, or another GPU"
        )
    return None


def peak_tflops(gpu: GpuType, precision: Precision) -> float:
    """Dense peak of the matrix products of a model held like this.

    4-bit weights, and FP8 ones on GPUs without FP8 arithmetic, are multiplied in 16 bits.
    """
    quantization = precision.quantization
    if quantization is not None and quantization.name == "fp8" and gpu.fp8_tflops is not None:
        return gpu.fp8_tflops
    if quantization is None and precision.dtype == "float32":
        return gpu.tflops / _FLOAT32_SLOWDOWN
    return gpu.tflops
