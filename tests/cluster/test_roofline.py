"""Ideal speed from bytes and operations, worked out by hand; and runs estimated from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gpus import GPU_TYPES
from cluster.model_size import model_size
from cluster.precision import AWQ, FP8, Precision
from cluster.roofline import (
    REAL_SHARE_HIGH,
    REAL_SHARE_LOW,
    Engine,
    RunEstimate,
    TokenTotal,
    Work,
    decode_step,
    estimate_run,
)
from jobs.estimate import total_with_interval
from tests.cluster.real_configs import LLAMA_3_8B, MIXTRAL_8X7B, MIXTRAL_8X22B, QWEN3_30B_A3B

BF16 = Precision()
MIXTRAL = model_size(MIXTRAL_8X7B)
ENGINES = st.builds(
    Engine,
    size=st.sampled_from([MIXTRAL, *map(model_size, (MIXTRAL_8X22B, LLAMA_3_8B, QWEN3_30B_A3B))]),
    gpu=st.sampled_from(list(GPU_TYPES.values())),
    tensor_parallel=st.sampled_from([1, 2, 4, 8]),
    precision=st.sampled_from([BF16, Precision(quantization=FP8), Precision(quantization=AWQ)]),
)


def engine(gpu: str, tensor_parallel: int = 1, precision: Precision = BF16) -> Engine:
    return Engine(MIXTRAL, GPU_TYPES[gpu], tensor_parallel, precision)


def exactly(tokens: int) -> TokenTotal:
    return TokenTotal(tokens, tokens, tokens)


def lengths(num_sequences: int, *, prompt: int, completion: int) -> Work:
    return Work(num_sequences, exactly(num_sequences * prompt), exactly(num_sequences * completion))


def test_an_h200_streams_mixtral_in_21_6_milliseconds_whatever_the_batch() -> None:
    # (93.405 - 0.262) GB over 0.9 x 4,800 GB/s; the input embedding isn't read
    for batch in (64, 256, 512):
        assert decode_step(engine("H200"), batch=batch, context=600).weights_s == pytest.approx(0.02156, rel=0.001)


@pytest.mark.parametrize(
    ("gpu", "tensor_parallel", "batch", "tokens_per_s"),
    [
        # weights 21.56 ms + KV 256 x 600 x 131,072 B / 4,320 GB/s = 4.66 ms
        ("H200", 1, 256, 9_760),
        # 21.56 + 9.32; operations 512 x (25.5 + 0.31) GFLOP / 792 TFLOP/s = 16.7 ms
        ("H200", 1, 512, 16_580),
        # 46.57 GB / 3,015 GB/s = 15.45 + 6.68
        ("H100-80G", 2, 512, 23_140),
        # 46.57 GB / 1,835 GB/s = 25.38 + 10.97
        ("A100-80G", 2, 512, 14_085),
        # 23.29 GB / 778 GB/s = 29.95 + 12.95
        ("L40S", 4, 512, 11_940),
    ],
)
def test_ideal_tokens_per_second_without_communication(
    gpu: str, tensor_parallel: int, batch: int, tokens_per_s: float
) -> None:
    step = decode_step(engine(gpu, tensor_parallel), batch=batch, context=600)
    assert batch / (step.ideal_s - step.communication_s) == pytest.approx(tokens_per_s, rel=0.002)


@pytest.mark.parametrize(
    ("gpu", "tensor_parallel", "batch"), [("H200", 1, 660), ("H100-80G", 2, 945), ("A100-80G", 2, 490)]
)
def test_operations_overtake_weights_at_a_batch_of_some_hundreds(gpu: str, tensor_parallel: int, batch: int) -> None:
    # weights over (operations of a sequence / peak), e.g. H200: 21.56 ms / (25.81 GFLOP / 792 TFLOP/s)
    below = decode_step(engine(gpu, tensor_parallel), batch=round(batch * 0.97), context=600)
    above = decode_step(engine(gpu, tensor_parallel), batch=round(batch * 1.03), context=600)
    assert below.compute_s < below.weights_s
    assert above.compute_s > above.weights_s


def test_a_bound_by_arithmetic_is_the_longer_of_the_two() -> None:
    step = decode_step(engine("A100-80G"), batch=4096, context=10)
    assert step.compute_s > step.weights_s + step.kv_s
    assert step.ideal_s == step.compute_s
    assert step.tokens_per_s == 4096 / step.compute_s


def test_all_reduces_cost_nothing_on_one_gpu_and_over_a_quarter_of_a_step_over_pcie() -> None:
    assert decode_step(engine("H200"), batch=512, context=600).communication_s == 0
    # 2 x 32 layers x 512 x 4096 x 2 bytes = 268 MB, x 2 x 3/4 through each GPU, over 0.75 x 31.5 GB/s
    pcie = decode_step(engine("L40S", 4), batch=512, context=600)
    assert pcie.communication_s == pytest.approx(0.01704, rel=0.001)
    # 268 MB x 2 x 1/2 over 0.75 x 450 GB/s
    nvlink = decode_step(engine("H100-80G", 2), batch=512, context=600)
    assert nvlink.communication_s == pytest.approx(0.000795, rel=0.001)


def test_fp8_reads_half_the_bytes_and_multiplies_twice_as_fast() -> None:
    wide = decode_step(engine("H200"), batch=512, context=600)
    narrow = decode_step(engine("H200", precision=Precision(quantization=FP8)), batch=512, context=600)
    assert narrow.weights_s == pytest.approx(wide.weights_s / 2, rel=0.01)
    assert narrow.compute_s == pytest.approx(wide.compute_s / 2, rel=0.01)
    assert narrow.kv_s == wide.kv_s


@settings(deadline=None)  # a busy machine is no failure
@given(engine=ENGINES, batch=st.integers(1, 1024), context=st.floats(1, 32_768), faster=st.floats(1, 10))
def test_more_bandwidth_is_never_slower(engine: Engine, batch: int, context: float, faster: float) -> None:
    gpu = engine.gpu.model_copy(update={"memory_gb_per_s": engine.gpu.memory_gb_per_s * faster})
    quick = Engine(engine.size, gpu, engine.tensor_parallel, engine.precision)
    before, after = (decode_step(each, batch=batch, context=context) for each in (engine, quick))
    assert after.tokens_per_s >= before.tokens_per_s
    work = lengths(10_000, prompt=round(context), completion=100)
    runs = [estimate_run(each, num_replicas=2, max_num_seqs=batch, work=work) for each in (engine, quick)]
    assert runs[1].ideal_s <= runs[0].ideal_s


@settings(deadline=None)  # a busy machine is no failure
@given(engine=ENGINES, batch=st.integers(1, 1000), context=st.floats(1, 32_768))
def test_a_larger_batch_never_makes_fewer_tokens_per_second(engine: Engine, batch: int, context: float) -> None:
    one, more = (decode_step(engine, batch=number, context=context) for number in (batch, batch + 1))
    assert more.tokens_per_s >= one.tokens_per_s * (1 - 1e-9)


def test_a_run_of_a_million_rows_by_hand() -> None:
    # One H200, 512 at once, prompts of 200, completions of 300: mean context 350. Memory: 300e6 / 512 steps of 21.56 +
    # 512 x 350 x 131,072 B / 4,320 GB/s = 5.44 ms: 15,820 s. Operations: 200e6 x 25.55 GFLOP (context 100) + 300e6 x
    # 25.68 (context 350), over 792 TFLOP/s: 6,452 + 9,728 s. The operations take longer.
    run = estimate_run(
        engine("H200"), num_replicas=1, max_num_seqs=512, work=lengths(10**6, prompt=200, completion=300)
    )
    assert run.ideal_s == pytest.approx(6_452 + 9_728, rel=0.002)
    assert run.wall_low_s == pytest.approx(run.ideal_s / REAL_SHARE_HIGH)
    assert run.wall_high_s == pytest.approx(run.ideal_s / REAL_SHARE_LOW)
    assert run.usd is None


def test_long_answers_to_short_prompts_are_bound_by_memory() -> None:
    # 1,000 completions of 1,000 at 100 at once: 10,000 steps of 21.56 + 100 x 510 x 131,072 B / 4,320 GB/s = 1.55 ms
    run = estimate_run(engine("H200"), num_replicas=1, max_num_seqs=100, work=lengths(1000, prompt=10, completion=1000))
    assert run.ideal_s == pytest.approx(231.1, rel=0.001)


def test_replicas_share_the_rows_and_the_bill_stays() -> None:
    work = lengths(10**6, prompt=200, completion=300)
    one, four = (
        estimate_run(engine("A100-80G", 2), num_replicas=number, max_num_seqs=512, work=work, usd_per_gpu_hour=2.5)
        for number in (1, 4)
    )
    assert (one.num_gpus, four.num_gpus) == (2, 8)
    assert four.ideal_s == pytest.approx(one.ideal_s / 4)
    assert four.gpu_hours == pytest.approx(one.gpu_hours)
    assert one.usd is not None
    assert four.usd == pytest.approx(one.usd)


def test_gpu_hours_and_cost_by_hand() -> None:
    run = RunEstimate(num_gpus=8, ideal_s=1800, wall_low_s=3600, wall_high_s=9000, usd_per_gpu_hour=2.5)
    assert run.gpu_hours == (8, 20)
    assert run.usd == (20, 50)


def test_the_interval_of_sampled_token_counts_widens_the_range() -> None:
    prompts = TokenTotal(**total_with_interval([100, 300] * 50, 0, 10_000))  # what `plan` reports of a sample
    assert prompts.low < prompts.total < prompts.high
    sure, sampled = (
        estimate_run(engine("H200"), num_replicas=1, max_num_seqs=512, work=Work(10_000, counted, exactly(1_000_000)))
        for counted in (exactly(prompts.total), prompts)
    )
    assert sampled.ideal_s == sure.ideal_s
    assert sampled.wall_low_s < sure.wall_low_s
    assert sampled.wall_high_s > sure.wall_high_s


def test_fewer_rows_than_the_engine_could_hold_run_as_the_batch_they_are() -> None:
    # 8 rows at once: 100 steps of 90% of the experts (1 - 0.75^8) and little else
    run = estimate_run(engine("H200"), num_replicas=1, max_num_seqs=512, work=lengths(8, prompt=1, completion=100))
    step = decode_step(engine("H200"), batch=8, context=51)
    assert run.ideal_s == pytest.approx(100 * (step.weights_s + step.kv_s))


def test_nothing_to_do_takes_no_time() -> None:
    run = estimate_run(engine("H200"), num_replicas=4, max_num_seqs=512, work=Work(0, exactly(0), exactly(0)))
    assert (run.ideal_s, run.wall_low_s, run.wall_high_s, run.gpu_hours) == (0, 0, 0, (0, 0))


@pytest.mark.parametrize(
    ("prompt", "completion", "batch", "tokens_per_s_and_gpu"),
    [(128, 128, 1024, 5_444), (128, 2048, 1024, 4_973), (2048, 128, 1024, 605)],
)
def test_published_throughput_lies_in_the_range_that_is_promised(
    prompt: int, completion: int, batch: int, tokens_per_s_and_gpu: float
) -> None:
    # TensorRT-LLM 0.9's performance page: Mixtral 8x7B, FP8, two H200s
    fp8 = engine("H200", 2, Precision(quantization=FP8))
    work = lengths(100_000, prompt=prompt, completion=completion)
    run = estimate_run(fp8, num_replicas=1, max_num_seqs=batch, work=work)
    measured_s = work.output_tokens.total / (2 * tokens_per_s_and_gpu)
    assert run.wall_low_s <= measured_s <= run.wall_high_s
