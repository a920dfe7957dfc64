"""Tensor-parallel sizes: cases worked out by hand, the rules in words, and laws that hold for any model and memory."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gpus import GPU_TYPES, GpuType
from cluster.model_size import ModelSize, model_size
from cluster.precision import AWQ, FP8, Precision
from cluster.topology import (
    Demand,
    Fit,
    assess,
    choose_tensor_parallel,
    require_fit,
    suggested_max_num_seqs,
    wanted_kv_tokens,
)
from pipeline.errors import SpecError
from tests.cluster.real_configs import LLAMA_3_8B, MIXTRAL_8X7B, MIXTRAL_8X22B, QWEN3_30B_A3B

MODELS = {
    "8x7B": model_size(MIXTRAL_8X7B),
    "8x22B": model_size(MIXTRAL_8X22B),
    "llama": model_size(LLAMA_3_8B),
    "qwen": model_size(QWEN3_30B_A3B),
}
BF16, FP16 = Precision(), Precision("float16")
DEMAND = Demand(max_model_len=4096, tokens_per_sequence=600)

# GiB per GPU, by hand: 0.92 x memory - weights - workspace = KV cache; and the engine's KV tokens, in thousands.
# Weights: 8x7B 46.70 B x 2 bytes = 86.99 GiB (FP8 43.74, AWQ 22.96); 8x22B 140.63 B: 261.95; Llama 3 8B 8.03 B: 14.96;
# Qwen3-30B-A3B 30.53 B: 56.87; each over the size. Workspace: 2 + 8192 tokens x 2 bytes x (top_k x (max(width/size,
# hidden) + max(2 width/size, hidden)) + 4 hidden). KV bytes per token: 8x7B 131,072; 8x22B 229,376; Llama 131,072;
# Qwen 98,304. Wanted: room for 128 sequences of 600, 76,800 tokens.
CASES = [
    # model, GPU, precision, size, memory, weights, workspace, KV GiB, KV tokens / 1000, and why no smaller size
    ("8x7B", "A100-80G", BF16, 2, 72.82, 43.50, 2.91, 26.42, 433),  # 1: 86.99 > 72.82
    ("8x7B", "H100-80G", BF16, 2, 72.77, 43.50, 2.91, 26.37, 432),  # 1: 86.99 > 72.77
    ("8x7B", "H100-NVL", BF16, 2, 85.58, 43.50, 2.91, 39.18, 642),  # 1: 86.99 > 85.58
    ("8x7B", "H200", BF16, 1, 128.54, 86.99, 3.56, 37.99, 311),
    ("8x7B", "B200", BF16, 1, 164.08, 86.99, 3.56, 73.53, 602),
    ("8x7B", "MI300X", BF16, 1, 176.35, 86.99, 3.56, 85.80, 703),
    ("8x7B", "A100-40G", BF16, 4, 36.23, 21.75, 2.59, 11.89, 389),  # 2: 43.50 > 36.23
    ("8x7B", "L40S", BF16, 4, 40.84, 21.75, 2.59, 16.50, 541),  # 2: 43.50 > 40.84
    ("8x7B", "RTX-A6000", BF16, 4, 43.61, 21.75, 2.59, 19.26, 631),  # 2: 43.50 + 2.91 > 43.61
    ("8x7B", "L4", BF16, 8, 20.27, 10.88, 2.50, 6.89, 452),  # 4: 21.75 > 20.27
    ("8x7B", "A10G", BF16, 8, 20.27, 10.88, 2.50, 6.89, 452),  # as L4
    ("8x7B", "RTX-4090", BF16, 8, 21.63, 10.88, 2.50, 8.25, 541),  # 4: 21.75 > 21.63
    ("8x7B", "H100-80G", Precision(quantization=FP8), 1, 72.77, 43.74, 3.56, 25.47, 209),
    ("8x7B", "L4", Precision(quantization=AWQ), 2, 20.27, 11.48, 2.91, 5.88, 96),  # 1: 22.96 > 20.27
    ("8x7B", "T4", Precision("float16", AWQ), 4, 13.40, 5.74, 2.59, 5.06, 166),  # 2: 11.48 + 2.91 > 13.40
    ("8x7B", "RTX-A6000", Precision(quantization=AWQ), 1, 43.61, 22.96, 3.56, 17.09, 140),
    ("8x22B", "A100-80G", BF16, 4, 72.82, 65.49, 2.81, 4.52, 85),  # 2: 130.97 > 72.82
    ("8x22B", "H200", BF16, 4, 128.54, 65.49, 2.81, 60.24, 1128),  # 2: 130.97 > 128.54
    ("8x22B", "L40S", BF16, 8, 40.84, 32.74, 2.75, 5.34, 200),  # 4: 65.49 > 40.84
    ("llama", "L4", BF16, 2, 20.27, 7.48, 2.58, 10.21, 167),  # 1: 2.40 GiB left, 19,700 tokens < 76,800
    ("qwen", "H100-80G", BF16, 1, 72.77, 56.87, 2.62, 13.28, 145),
    ("qwen", "L40S", BF16, 2, 40.84, 28.45, 2.62, 9.77, 213),  # 1: 56.87 > 40.84; routers, 0.02, on both
]


@pytest.mark.parametrize(
    ("model", "gpu", "precision", "expected", "memory", "weights", "workspace", "kv", "kv_thousands"),
    CASES,
    ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in CASES],
)
def test_size_and_figures_worked_out_by_hand(
    model: str,
    gpu: str,
    precision: Precision,
    expected: int,
    memory: float,
    weights: float,
    workspace: float,
    kv: float,
    kv_thousands: float,
) -> None:
    demand = dataclasses.replace(DEMAND, precision=precision)
    choice = choose_tensor_parallel(MODELS[model], gpu=GPU_TYPES[gpu], demand=demand)
    chosen = choice.chosen
    assert chosen is not None, choice.reason
    assert chosen.tensor_parallel == expected
    assert chosen.fit is Fit.ROOMY
    assert pytest.approx(memory, abs=0.01) == 0.92 * GPU_TYPES[gpu].memory_gib
    assert chosen.weights_gib == pytest.approx(weights, abs=0.01)
    assert chosen.overhead_gib == pytest.approx(workspace, abs=0.01)
    assert chosen.kv_gib == pytest.approx(kv, abs=0.02)
    assert chosen.kv_tokens / 1000 == pytest.approx(kv_thousands, abs=0.6)
    assert choice.replicas_per_node == 8 // expected
    smaller = [each for each in choice.candidates if each.tensor_parallel < expected]
    assert all(each.problem for each in smaller)


@pytest.mark.parametrize(
    ("model", "gpu", "precision", "words"),
    [
        ("8x7B", "T4", BF16, "T4 can't compute in bfloat16: its compute capability is 7.5, bfloat16 needs 8.0"),
        # 0.92 x 14.56 = 13.40; 13.40 - 10.88 - 2.50 = 0.02 GiB, 1,260 tokens
        ("8x7B", "T4", FP16, "tensor_parallel=8 leaves room for 1,259 KV tokens, but one sequence of max_model_len "),
        # 261.95 / 8
        ("8x22B", "L4", BF16, "tensor_parallel=8 puts 32.7 GiB of bfloat16 weights and 2.8 GiB of workspace on each"),
        ("8x22B", "RTX-4090", BF16, "RTX-4090 has 21.6 GiB to give (0.92 of 23.51); use an FP8, AWQ or GPTQ model"),
    ],
)
def test_what_no_node_can_hold_is_refused_with_reason_and_cure(
    model: str, gpu: str, precision: Precision, words: str
) -> None:
    demand = dataclasses.replace(DEMAND, precision=precision)
    choice = choose_tensor_parallel(MODELS[model], gpu=GPU_TYPES[gpu], demand=demand)
    assert choice.chosen is None
    assert choice.replicas_per_node == 0
    assert words in choice.reason
    assert "use " in choice.reason


@pytest.mark.parametrize(
    ("gpu", "tensor_parallel", "precision", "tokens"),
    [
        ("A100-80G", 2, BF16, 440_000),
        ("H100-80G", 2, BF16, 434_000),
        ("H100-80G", 4, BF16, 1_581_000),
        ("H100-80G", 1, Precision(quantization=FP8), 217_000),
        ("H200", 1, BF16, 318_000),
        ("H200", 1, Precision(quantization=FP8), 675_000),
        ("L40S", 4, BF16, 537_000),
        ("A100-40G", 4, BF16, 385_000),
    ],
)
def test_kv_tokens_of_mixtral_agree_with_an_earlier_estimate_within_five_percent(
    gpu: str, tensor_parallel: int, precision: Precision, tokens: int
) -> None:
    # That one took nvidia-smi's totals and 3.5 GB of overhead per GPU; this one torch's totals and overhead by size.
    demand = dataclasses.replace(DEMAND, precision=precision)
    candidate = assess(MODELS["8x7B"], gpu=GPU_TYPES[gpu], demand=demand, tensor_parallel=tensor_parallel)
    assert candidate.kv_tokens == pytest.approx(tokens, rel=0.05)


def test_every_size_looked_at_says_what_speaks_against_it() -> None:
    choice = choose_tensor_parallel(MODELS["8x7B"], gpu=GPU_TYPES["A100-80G"], demand=DEMAND)
    problems = {each.tensor_parallel: each.problem for each in choice.candidates}
    assert problems == {
        1: "tensor_parallel=1 puts 87.0 GiB of bfloat16 weights and 3.6 GiB of workspace on each GPU, but A100-80G has "
        "72.8 GiB to give (0.92 of 79.15)",
        2: None,
        3: "tensor_parallel=3 doesn't divide the model's 32 attention heads",
        4: None,
        5: "tensor_parallel=5 doesn't divide the model's 32 attention heads",
        6: "tensor_parallel=6 doesn't divide the model's 32 attention heads",
        7: "tensor_parallel=7 doesn't divide the model's 32 attention heads",
        8: None,
    }
    assert choice.reason == (
        "tensor_parallel=2, 43.5 GiB of bfloat16 weights a GPU, is the smallest with room enough: 432,785 KV tokens, "
        "721 sequences of 600"
    )


@pytest.mark.parametrize(
    ("model", "tensor_parallel", "words"),
    [
        ("8x22B", 6, "tensor_parallel=6 neither divides the model's 8 KV heads nor is a multiple of them"),  # 48 heads
        ("8x22B", 3, "tensor_parallel=3 neither divides the model's 8 KV heads nor is a multiple of them"),
        ("llama", 16, None),  # 32 heads, 8 KV heads, each held twice
        ("qwen", 32, None),  # 4 KV heads held eight times; experts of 768
    ],
)
def test_sizes_that_vllms_layers_assert_against(model: str, tensor_parallel: int, words: str | None) -> None:
    candidate = assess(MODELS[model], gpu=GPU_TYPES["H200"], demand=DEMAND, tensor_parallel=tensor_parallel)
    assert candidate.problem == words


def test_an_mlp_width_must_be_divided() -> None:
    size = dataclasses.replace(MODELS["qwen"], mlp_widths=(12, 768))
    candidate = assess(size, gpu=GPU_TYPES["H200"], demand=DEMAND, tensor_parallel=8)
    assert candidate.problem == "tensor_parallel=8 doesn't divide an MLP width of 12"


def test_without_room_for_a_batch_the_largest_size_is_taken_and_said_to_be_tight() -> None:
    # 8x22B in bf16 on 8 x A100-40G: 36.23 - 32.74 - 2.75 = 0.73 GiB a GPU, 27,400 tokens, 45 sequences of 600
    choice = choose_tensor_parallel(MODELS["8x22B"], gpu=GPU_TYPES["A100-40G"], demand=DEMAND)
    assert choice.chosen is not None
    assert (choice.chosen.tensor_parallel, choice.chosen.fit) == (8, Fit.TIGHT)
    assert choice.chosen.max_num_seqs == 40
    assert "the largest that model and node allow" in choice.reason
    assert "too few for a batch that pays" in choice.reason


def test_a_demand_for_kv_tokens_is_insisted_on() -> None:
    demand = dataclasses.replace(DEMAND, min_kv_tokens=1_000_000)
    choice = choose_tensor_parallel(MODELS["8x7B"], gpu=GPU_TYPES["A100-80G"], demand=demand)
    assert choice.chosen is not None
    assert choice.chosen.tensor_parallel == 4
    assert choice.candidates[1].problem == (
        "tensor_parallel=2 leaves room for 432,785 KV tokens, but min_kv_tokens asks for 1,000,000"
    )
    none = dataclasses.replace(DEMAND, min_kv_tokens=100_000_000)
    assert choose_tensor_parallel(MODELS["8x7B"], gpu=GPU_TYPES["A100-80G"], demand=none).chosen is None


def test_long_sequences_want_more_cache_but_no_more_than_the_weights_weigh() -> None:
    size = MODELS["8x7B"]
    assert wanted_kv_tokens(size, DEMAND) == 128 * 600
    long = Demand(max_model_len=32_768, tokens_per_sequence=30_000)
    assert wanted_kv_tokens(size, long) == 93_405_585_408 // 131_072  # not 128 x 30,000
    short = Demand(max_model_len=32_768, tokens_per_sequence=100)
    assert wanted_kv_tokens(size, short) == 32_768
    choice = choose_tensor_parallel(size, gpu=GPU_TYPES["H200"], demand=long)
    assert choice.chosen is not None
    assert choice.chosen.tensor_parallel == 2


def test_a_node_with_fewer_gpus_takes_smaller_sizes_only() -> None:
    four = choose_tensor_parallel(MODELS["8x7B"], gpu=GPU_TYPES["L4"], demand=DEMAND, gpus_per_node=4)
    assert four.chosen is None
    assert "nothing fits on a node of 4: tensor_parallel=4 puts 21.7 GiB" in four.reason
    six = choose_tensor_parallel(MODELS["8x7B"], gpu=GPU_TYPES["L40S"], demand=DEMAND, gpus_per_node=6)
    assert six.chosen is not None
    assert (six.chosen.tensor_parallel, six.replicas_per_node) == (4, 1)


def test_what_no_node_holds_is_told_which_size_would_do_over_several() -> None:
    """At 8 there is room for 200,000 tokens, see `CASES`; at 4 the weights alone take 65.49 of 40.84 GiB."""
    choice = choose_tensor_parallel(MODELS["8x22B"], gpu=GPU_TYPES["L40S"], demand=DEMAND, gpus_per_node=4)
    assert choice.chosen is None
    assert choice.reason.endswith("or set tensor_parallel=8, over 2 nodes with a fast network")


def test_a_size_that_a_user_gave_is_refused_with_the_one_to_use() -> None:
    with pytest.raises(SpecError, match=r"tensor_parallel=2 puts 43\.5 GiB .* L4 has 20\.3 .*; use tensor_parallel=8$"):
        require_fit(MODELS["8x7B"], gpu=GPU_TYPES["L4"], demand=DEMAND, tensor_parallel=2)
    with pytest.raises(SpecError, match=r"tensor_parallel=3 doesn't divide .*; use tensor_parallel=2$"):
        require_fit(MODELS["8x7B"], gpu=GPU_TYPES["A100-80G"], demand=DEMAND, tensor_parallel=3)
    with pytest.raises(SpecError, match="can't compute in bfloat16"):
        require_fit(MODELS["8x7B"], gpu=GPU_TYPES["T4"], demand=DEMAND, tensor_parallel=8)
    with pytest.raises(SpecError, match=r"; nothing fits on a node of 8: .*; use an FP8, AWQ or GPTQ model"):
        require_fit(MODELS["8x22B"], gpu=GPU_TYPES["L4"], demand=DEMAND, tensor_parallel=4)
    require_fit(MODELS["8x7B"], gpu=GPU_TYPES["A100-80G"], demand=DEMAND, tensor_parallel=4)
    tight = dataclasses.replace(DEMAND, max_model_len=1024, precision=FP16)
    require_fit(MODELS["8x7B"], gpu=GPU_TYPES["T4"], demand=tight, tensor_parallel=8)


def test_the_suggested_batch_is_what_fits_in_eights_and_within_reason() -> None:
    fits = {0: 1, 1: 1, 7: 7, 8: 8, 15: 8, 721: 720, 1023: 1016, 1024: 1024, 9000: 1024}
    assert {number: suggested_max_num_seqs(number) for number in fits} == fits
    candidate = assess(MODELS["8x7B"], gpu=GPU_TYPES["H200"], demand=DEMAND, tensor_parallel=1)
    assert (candidate.num_sequences, candidate.max_num_seqs, candidate.max_num_batched_tokens) == (518, 512, 8192)
    few = dataclasses.replace(DEMAND, max_num_batched_tokens=256)
    assert assess(MODELS["8x7B"], gpu=GPU_TYPES["H200"], demand=few, tensor_parallel=1).max_num_batched_tokens >= 512


def gpu_with(memory_gib: float) -> GpuType:
    return GPU_TYPES["H100-80G"].model_copy(update={"memory_gib": memory_gib})


@st.composite
def sizes(draw: st.DrawFn) -> ModelSize:
    """Models of any shape, not only those that exist."""
    kv_heads, group = draw(st.sampled_from([1, 2, 3, 4, 8, 16])), draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    width, layers = draw(st.sampled_from([512, 768, 1408, 14336, 16384, 18944])), draw(st.integers(24, 80))
    experts, hidden = draw(st.sampled_from([0, 8, 60, 128])), draw(st.sampled_from([2048, 4096, 6144, 8192]))
    config = {
        "model_type": "qwen3_moe" if experts else "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([64, 128])),
        "intermediate_size": width,
        "vocab_size": draw(st.sampled_from([32_000, 151_936])),
    }
    if experts:
        config |= {"num_experts": experts, "num_experts_per_tok": 2}
    return model_size(config)


demands = st.builds(
    Demand,
    max_model_len=st.sampled_from([512, 4096, 32_768]),
    tokens_per_sequence=st.integers(16, 32_768),
    precision=st.sampled_from([BF16, Precision(quantization=FP8), Precision(quantization=AWQ), Precision("float32")]),
    min_kv_tokens=st.none() | st.integers(1, 2_000_000),
)
memories = st.floats(8, 300)
INFINITE = 1000


def chosen_size(size: ModelSize, memory_gib: float, demand: Demand, gpus_per_node: int) -> int:
    choice = choose_tensor_parallel(size, gpu=gpu_with(memory_gib), demand=demand, gpus_per_node=gpus_per_node)
    return choice.chosen.tensor_parallel if choice.chosen else INFINITE


@settings(deadline=None)  # a busy machine is no failure
@given(size=sizes(), demand=demands, one=memories, other=memories, node=st.integers(1, 16))
def test_more_memory_never_needs_a_larger_size(
    size: ModelSize, demand: Demand, one: float, other: float, node: int
) -> None:
    less, more = sorted([one, other])
    assert chosen_size(size, more, demand, node) <= chosen_size(size, less, demand, node)


@settings(deadline=None)  # a busy machine is no failure
@given(size=sizes(), demand=demands, memory=memories, node=st.integers(1, 16), extra=st.integers(1, 10**11))
def test_more_weights_never_need_a_smaller_size(
    size: ModelSize, demand: Demand, memory: float, node: int, extra: int
) -> None:
    heavier = dataclasses.replace(size, mlp=size.mlp + extra)
    assert chosen_size(heavier, memory, demand, node) >= chosen_size(size, memory, demand, node)


@settings(deadline=None)  # a busy machine is no failure
@given(size=sizes(), demand=demands, memory=memories, node=st.integers(1, 16))
def test_a_chosen_size_obeys_every_rule_and_fits(size: ModelSize, demand: Demand, memory: float, node: int) -> None:
    choice = choose_tensor_parallel(size, gpu=gpu_with(memory), demand=demand, gpus_per_node=node)
    if choice.chosen is None:
        assert all(each.fit is Fit.REFUSED and each.problem for each in choice.candidates)
        return
    chosen = choice.chosen
    tensor_parallel = chosen.tensor_parallel
    assert tensor_parallel <= node
    assert size.num_heads % tensor_parallel == 0
    assert size.num_kv_heads % tensor_parallel == 0 or tensor_parallel % size.num_kv_heads == 0
    assert all(width % tensor_parallel == 0 for width in size.mlp_widths)
    assert chosen.kv_tokens >= max(demand.max_model_len, demand.min_kv_tokens or 0)
    used = chosen.weights_gib + chosen.overhead_gib
    per_gpu = chosen.kv_tokens * size.kv_bytes_per_token(demand.precision, tensor_parallel=tensor_parallel) / 2**30
    assert used + per_gpu <= demand.utilisation * memory * (1 + 1e-9)
