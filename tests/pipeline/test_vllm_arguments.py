"""What vLLM is started with: what a spec may change, what it can't, and names that vLLM doesn't know."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import SpecError
from pipeline.vllm_arguments import engine_arguments, engine_environment, refuse_unknown


def arguments(given: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model_path": "/models/mixtral",
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_seqs": 512,
        "tensor_parallel": 2,
        "with_routing": True,
        "on_cpu": False,
    }
    return engine_arguments(given or {}, **settings | changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scheduling_policy", "fcfs"), ("trust_remote_code", True), ("model", "other"), ("disable_log_stats", True)],
)
def test_what_results_and_priorities_hang_on_is_not_the_specs_to_change(name: str, value: Any) -> None:
    assert arguments({name: value})[name] == arguments()[name] != value


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_num_batched_tokens", 1024), ("load_format", "dummy"), ("distributed_executor_backend", "ray")],
)
def test_what_is_a_matter_of_speed_is(name: str, value: Any) -> None:
    assert arguments({name: value})[name] == value != arguments()[name]


def test_cpu_engines_prefill_whole_prompts_in_one_step() -> None:
    args = arguments(on_cpu=True, tensor_parallel=1, max_model_len=3000)
    assert args["enable_chunked_prefill"] is False
    assert args["max_num_batched_tokens"] >= 3000
    assert "distributed_executor_backend" not in args
    assert "enable_chunked_prefill" not in arguments()


def test_a_core_of_its_own_is_for_gpus_and_for_several_workers() -> None:
    gpu = engine_environment(on_cpu=False, num_threads=1, tensor_parallel=1)
    one = engine_environment(on_cpu=True, num_threads=4, tensor_parallel=1)
    two = engine_environment(on_cpu=True, num_threads=4, tensor_parallel=2)
    assert [env.get("VLLM_ENABLE_V1_MULTIPROCESSING") for env in (gpu, one, two)] == [None, "0", None]
    assert (one["OMP_NUM_THREADS"], two["VLLM_CPU_OMP_THREADS_BIND"]) == ("4", "0|1")
    assert all(env["VLLM_NO_USAGE_STATS"] == "1" for env in (gpu, one, two))


def test_an_argument_that_vllm_does_not_know_is_refused_with_the_likely_name() -> None:
    refuse_unknown(["max_num_seqs"], {"max_num_seqs", "seed"})
    with pytest.raises(SpecError, match=r"`max_num_seq` is not an engine argument.*did you mean `max_num_seqs`"):
        refuse_unknown(["seed", "max_num_seq"], {"max_num_seqs", "seed"})
