"""The table of GPU types, and what it refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.gpus import GPU_TYPES, GpuType, gpu_type, peak_tflops, precision_problem
from cluster.precision import AWQ, FP8, Precision
from pipeline.errors import SpecError

BF16, FP16 = Precision("bfloat16"), Precision("float16")
NAMEPLATE_GB = {
    "A100-40G": 40, "A100-80G": 80, "H100-80G": 80, "H100-NVL": 94, "H200": 141, "B200": 180, "L4": 24, "L40S": 48,
    "A10G": 24, "T4": 16, "RTX-4090": 24, "RTX-A6000": 48, "MI300X": 192,
}  # fmt: skip
MINE = GpuType(name="H20", memory_gib=95.0, memory_gb_per_s=4000, tflops=148, ray_labels=["H20"])


def test_the_table_has_every_promised_type() -> None:
    assert set(GPU_TYPES) == {*NAMEPLATE_GB, "cpu"}
    assert all(gpu.name == name and len(gpu.source) > 5 for name, gpu in GPU_TYPES.items())


def test_usable_memory_is_somewhat_less_than_the_name_says() -> None:
    for name, gigabytes in NAMEPLATE_GB.items():
        in_the_way_vendors_count = GPU_TYPES[name].memory_gib * 2**30 / 1e9
        as_gib = GPU_TYPES[name].memory_gib
        assert as_gib < gigabytes, name
        assert in_the_way_vendors_count > 0.95 * gigabytes, name


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80G"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
    ],
)
def test_a_type_labelled_by_ray_knows_the_label_that_ray_makes(device: str, name: str) -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    label = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(device)
    assert label in GPU_TYPES[name].ray_labels
    assert GPU_TYPES[name].labelled_by_ray


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA H100 NVL", "H100-NVL"),
    ],
)
def test_types_that_ray_cannot_tell_apart_are_labelled_by_hand(device: str, name: str) -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    assert NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(device) not in GPU_TYPES[name].ray_labels
    assert GPU_TYPES[name].ray_labels == [name]
    assert not GPU_TYPES[name].labelled_by_ray


def test_amd_labels_are_rays() -> None:
    from ray._private.accelerators.amd_gpu import amd_product_dict

    assert set(GPU_TYPES["MI300X"].ray_labels) - {"MI300X"} <= set(amd_product_dict.values())


def test_no_label_means_two_types() -> None:
    labels = [label for gpu in GPU_TYPES.values() for label in gpu.ray_labels]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("H100", "H100-80G"), ("A100", "A100-40G"), ("h200", "H200"), ("A100-80GB", "A100-80G"), ("L40", "L40S")],
)
def test_an_unknown_type_is_answered_with_the_nearest_and_the_cure(wrong: str, meant: str) -> None:
    with pytest.raises(SpecError, match=rf"gpu '{wrong}' is no GPU type.*did you mean [^?]*{meant}.*describe yours"):
        gpu_type(wrong)


def test_nothing_is_suggested_for_what_resembles_nothing() -> None:
    with pytest.raises(SpecError, match=r"'qqqq' is no GPU type known here\. Known are A100-40G"):
        gpu_type("qqqq")


def test_users_types_are_found_and_come_before_the_tables() -> None:
    assert gpu_type("H20", [MINE]) is MINE
    mine = MINE.model_copy(update={"name": "H200"})
    assert gpu_type("H200", [mine]) is mine
    assert gpu_type("H200") is GPU_TYPES["H200"]


@pytest.mark.parametrize(
    "wrong", [{"memory_gib": 0}, {"memory_gb_per_s": -1}, {"tflops": float("nan")}, {"name": "-"}, {"memory": 80}]
)
def test_an_impossible_type_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GpuType(**MINE.model_dump() | wrong)


def test_only_turing_is_refused_for_bfloat16_and_the_reason_names_the_cure() -> None:
    problems = {name: precision_problem(gpu, BF16) for name, gpu in GPU_TYPES.items()}
    assert [name for name, problem in problems.items() if problem] == ["T4"]
    assert problems["T4"] == (
        "T4 can't compute in bfloat16: its compute capability is 7.5, bfloat16 needs 8.0; set model.dtype: float16, or "
        "use another GPU"
    )
    assert precision_problem(GPU_TYPES["T4"], FP16) is None


def test_fp8_weights_need_turing_or_newer_and_no_cpu() -> None:
    fp8 = Precision("float16", FP8)
    refused = [name for name, gpu in GPU_TYPES.items() if precision_problem(gpu, fp8)]
    assert refused == ["cpu"]
    volta = MINE.model_copy(update={"compute_capability": 7.0})
    assert "its compute capability is 7.0, vLLM's kernels need 7.5" in str(precision_problem(volta, fp8))
    assert precision_problem(volta, Precision("float16", AWQ)) is None


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("H100-80G", BF16, 989.5),
        ("H100-80G", Precision(quantization=FP8), 1979),
        ("H100-80G", Precision(quantization=AWQ), 989.5),  # unpacked to 16 bits, then multiplied
        ("A100-80G", Precision(quantization=FP8), 312),  # no FP8 arithmetic: likewise
        ("A100-80G", Precision("float32"), 19.5),
    ],
)
def test_weights_are_multiplied_at_the_peak_of_what_the_gpu_has(name: str, precision: Precision, tflops: float) -> None:
    assert peak_tflops(GPU_TYPES[name], precision) == tflops
