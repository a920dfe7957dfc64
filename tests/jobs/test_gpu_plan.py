"""`plan` on GPUs: figures worked out by hand, what is counted and what isn't, and its words on the command line.

By hand, Mixtral 8x7B in bf16, 46.70 B parameters (12.88 B of them per token, 0.13 B input embedding), on H100-80G at 2:
43.50 GiB of weights and 26.37 GiB of KV cache a GPU, 432,000 tokens in the engine, 421 sequences of half a
`max_model_len` of 2048, 416 in eights. A decode step of 416 sequences of 250 tokens: 46.57 GB of weights a GPU at
0.9 x 3,350 GB/s, 15.4 ms; 416 x 250 x 65,536 bytes of KV cache, 2.3 ms; both longer than 416 x 25.6 GFLOP at
2 x 0.8 x 989.5 TFLOP/s, 6.7 ms; all-reduces of 524,288 bytes a token at 0.75 x 450 GB/s, 0.65 ms: 18.4 ms, 22,660
tokens/s an engine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.hardware import Hardware, assumed_hardware
from cluster.roofline import TokenTotal, Work
from cluster.settings import FleetSettings
from jobs.estimate import estimate, estimate_lines, machines_of
from jobs.gpu_plan import GpuPlan, Question, expected_output, plan_gpus
from jobs.gpu_plan_text import gpu_lines
from jobs.prepare import prepare
from jobs.run import RunOptions, run_job
from jobs.spec import parse_spec
from pipeline.errors import SpecError
from pipeline.settings import ModelSettings
from tests.extra_nodes import extra_nodes
from tests.own_ray import NUM_CPUS
from tests.tiny_models import make_mixtral_8x7b_without_weights
from tests.whole_runs import spec_text, write_prompts

PROGRAM = Path(sys.executable).parent / "tramontane"
H20 = {"name": "H20", "memory_gib": 94.8, "memory_gb_per_s": 4000, "tflops": 148, "ray_labels": ["NVIDIA-H20"]}
WORK = Work(100_000, TokenTotal(20_000_000, 20_000_000, 20_000_000), TokenTotal(10_000_000, 10_000_000, 10_000_000))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixtral_8x7b_without_weights(tmp_path_factory.mktemp("models") / "mixtral")


def planned(
    mixtral: Path, fleet: Any, hardware: Hardware | None, *, assumed: bool = True, work: Work = WORK
) -> GpuPlan:
    model = ModelSettings(source=str(mixtral))
    question = Question(FleetSettings.model_validate(fleet), model, str(mixtral), work)
    return plan_gpus(question, hardware, assumed=assumed)


def test_figures_worked_out_by_hand(mixtral: Path) -> None:
    """Ideal seconds of 1.25 M prompt and 0.625 M output tokens an engine: arithmetic 0.625 M / 416 x 6.7 ms + 1.25 M x
    25.55 GFLOP / 1,583 TFLOP/s = 10.1 + 20.2 s, more than memory's 26.6 s; 1.875 M tokens x 1.55 us of all-reduces."""
    plan = planned(mixtral, "auto", assumed_hardware(["H100-80G:8x4"]))
    [pool] = plan.pools
    chosen = pool.candidate
    assert chosen is not None
    assert (chosen.tensor_parallel, pool.replicas_per_node, pool.num_replicas) == (2, 4, 16)
    assert chosen.max_num_seqs == 416
    assert chosen.weights_gib == pytest.approx(43.50, abs=0.01)
    assert chosen.kv_tokens == pytest.approx(432_000, rel=0.002)
    assert pool.ideal_tokens_per_s == pytest.approx(22_660, rel=0.01)
    shown = pool.to_json()
    assert shown["expected_tokens_per_s"] == pytest.approx([0.2 * 362_600, 0.6 * 362_600], rel=0.01)
    assert any("tensor_parallel=1 puts 87.0 GiB of bfloat16 weights" in problem for problem in pool.refused)
    total = plan.total()
    assert total is not None
    assert total["gpus"] == 32
    assert total["ideal_s"] == pytest.approx(33.2, rel=0.01)
    assert total["wall_s"] == pytest.approx([33.2 / 0.6, 33.2 / 0.2], rel=0.01)
    assert total["gpu_hours"] == pytest.approx([33.2 / 0.6 * 32 / 3600, 33.2 / 0.2 * 32 / 3600], rel=0.01)
    assert total["usd"] is None


def test_pools_share_the_work_and_each_costs_what_it_costs(mixtral: Path) -> None:
    price = {"gpu": "H100-80G", "tensor_parallel": 2, "replicas": "max", "usd_per_gpu_hour": 3}
    alone = planned(mixtral, {"pools": [price]}, assumed_hardware(["H100-80G:8x1"])).total()
    twice = planned(mixtral, {"pools": [price]}, assumed_hardware(["H100-80G:8x2"])).total()
    assert alone is not None
    assert twice is not None
    assert twice["wall_s"][0] == pytest.approx(alone["wall_s"][0] / 2, rel=0.01)
    assert alone["usd"] == pytest.approx([3 * hours for hours in alone["gpu_hours"]])
    other = {"gpu": "H200", "replicas": "max", "usd_per_gpu_hour": 4}
    nodes = assumed_hardware(["H100-80G:8x1", "H200:8x1"])
    both = planned(mixtral, {"pools": [price, other]}, nodes).total()
    single = planned(mixtral, {"pools": [other]}, assumed_hardware(["H200:8x1"])).total()
    assert both is not None
    assert single is not None
    for end in (0, 1):
        assert 1 / both["wall_s"][end] == pytest.approx(1 / alone["wall_s"][end] + 1 / single["wall_s"][end])
        hours = both["wall_s"][end] / 3600 * 8
        assert both["usd"][end] == pytest.approx(3 * hours + 4 * hours)
    free = planned(mixtral, {"pools": [price, {**other, "usd_per_gpu_hour": None}]}, nodes).total()
    assert free is not None
    assert free["usd"] is None, "a sum without one pool's price would be too low"


def test_what_the_spec_does_not_ask_for_is_planned_when_assumed_and_not_counted_when_seen(mixtral: Path) -> None:
    nodes = assumed_hardware(["H100-80G:8x1"])
    cpu: dict[str, Any] = {"pools": [{"gpu": "cpu"}]}
    assumed, seen = planned(mixtral, cpu, nodes), planned(mixtral, cpu, nodes, assumed=False)
    assert assumed.pools[0].num_replicas == 4
    assert assumed.notes == ("H100-80G: a run of this spec would not use it; set `fleet: auto`, or add a pool",)
    assert seen.pools[0].num_replicas == 0
    assert seen.pools[0].candidate is not None
    assert seen.total() is None


def test_pools_without_nodes_and_nodes_without_types_are_told(mixtral: Path) -> None:
    hardware = Hardware((), unknown=("8 GPUs labelled V100: describe the type",))
    plan = planned(mixtral, {"pools": [{"gpu": "H200"}]}, hardware, assumed=False)
    assert plan.notes == (
        "not used: 8 GPUs labelled V100: describe the type",
        "H200: fleet.pools asks for it, but there is none",
    )


def test_a_type_that_can_not_hold_the_model_is_refused_and_the_others_planned(mixtral: Path) -> None:
    plan = planned(mixtral, "auto", assumed_hardware(["T4:4x1", "H200:8x1"]))
    refused, fine = plan.pools
    assert (refused.gpu, refused.num_replicas, refused.candidate) == ("T4", 0, None)
    assert refused.reason.startswith("T4 can't compute in bfloat16")
    assert fine.num_replicas == 8


@pytest.mark.parametrize(
    ("pool", "replicas", "words"),
    [
        ({"replicas": 3}, 3, "tensor_parallel=1 is the spec's, 87.0 GiB of weights a GPU"),
        ({"replicas": {"min": 1, "max": 20}}, 8, "is the spec's"),
        ({"replicas": 9}, 8, "but 9 x 1 GPU of H200 on one node are needed, and 8 fit"),
        ({"replicas": "max", "tensor_parallel": 4}, 2, "; `auto` would take 1"),
        (
            {"replicas": "max", "tensor_parallel": 16},
            0,
            "but 1 x 8 GPUs of H200 on each of 2 nodes are needed, and 0 fit",
        ),
    ],
)
def test_the_specs_own_numbers_are_kept_and_commented(
    mixtral: Path, pool: dict[str, Any], replicas: int, words: str
) -> None:
    [found] = planned(mixtral, {"pools": [{"gpu": "H200", **pool}]}, assumed_hardware(["H200:8x1"])).pools
    assert found.num_replicas == replicas
    assert words in found.reason


def test_a_replica_over_nodes_is_counted_and_said_to_hang_on_the_network(mixtral: Path) -> None:
    """All-reduces of 524,288 bytes a token, 2 x 15/16 of them sent: 983,040 / (0.75 x 25 GB/s) = 52.4 us a token."""
    spec = {"pools": [{"gpu": "H100-80G", "replicas": "max", "tensor_parallel": 16}]}
    plan = planned(mixtral, spec, assumed_hardware(["H100-80G:8x5"]))
    [pool] = plan.pools
    assert (pool.num_replicas, pool.nodes_per_replica, pool.replicas_per_node) == (2, 2, 0)
    [note] = plan.notes
    assert note.startswith("H100-80G: a replica of 16 GPUs spans 2 nodes, and the network between them decides its spe")
    assert pool.candidate is not None
    assert pool.ideal_tokens_per_s < 1 / 52.4e-6
    tokens = {"total": 1, "low": 1, "high": 1}
    report = {"cluster": "assumed", "notes": [], "pools": [pool.to_json()], "output_tokens": tokens, "total": None}
    report |= {"later_steps": [], "was_looked_at": True}
    [cells] = [line for line in gpu_lines({**report, "output_is_exact": True}) if line.startswith("          H100-80G")]
    assert cells.split()[1:9] == ["5", "x", "8", "16", "1", "on", "2", "2"]
    alone = planned(mixtral, spec, None)
    assert alone.pools[0].num_replicas == 1
    assert alone.notes[0] == "planned on as many nodes of 8 GPUs as a replica takes for each pool"


def test_without_a_cluster_each_pool_is_planned_on_one_node_and_says_so(mixtral: Path) -> None:
    plan = planned(mixtral, {"pools": [{"gpu": "H200", "replicas": "max"}]}, None)
    assert plan.pools[0].num_replicas == 8
    assert plan.notes == ("planned on one node of 8 GPUs for each pool",)
    automatic = planned(mixtral, "auto", None)
    assert automatic.pools == ()
    assert automatic.notes == ("fleet: auto takes what a cluster has, so there is nothing to plan yet",)


def test_the_users_batch_size_is_what_is_planned(mixtral: Path) -> None:
    args = {"engine_args": {"max_num_seqs": 16}}
    [pool] = planned(mixtral, {"pools": [{"gpu": "H200", **args}]}, assumed_hardware(["H200:8x1"])).pools
    assert pool.candidate is not None
    assert pool.candidate.max_num_seqs == 16


def test_expected_output_is_a_guess_within_the_limit_and_exact_when_nothing_ends_early() -> None:
    limit = TokenTotal(1000, 900, 1100)
    assert dataclasses.astuple(expected_output(limit, is_exact=False)) == (500, 225, 1100)
    assert expected_output(limit, is_exact=True) == limit


def test_no_rows_take_no_time(mixtral: Path) -> None:
    nothing = TokenTotal(0, 0, 0)
    total = planned(mixtral, "auto", assumed_hardware(["H200:8x1"]), work=Work(0, nothing, nothing)).total()
    assert total is not None
    assert total["wall_s"] == [0.0, 0.0]


def test_a_users_own_type_is_planned_end_to_end(mixtral: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"source": str(mixtral), "dtype": "bfloat16"},
        "fleet": {"gpu_types": [H20], "pools": [{"gpu": "H20", "tensor_parallel": "auto", "usd_per_gpu_hour": 2.0}]},
        "sampling": {"ignore_eos": True},
    }
    text = spec_text(write_prompts(tmp_path / "in.parquet", 40), tmp_path / "out", **sections)
    spec = parse_spec(text, name="job.yaml")
    machines = machines_of(spec, ["H20:8x1"], None)
    report = estimate(prepare(spec, weights=False), sample_rows=100, machines=machines)
    [pool] = report["gpus"]["pools"]
    assert (pool["gpu"], pool["tensor_parallel"], pool["replicas"]) == ("H20", 2, 1)
    assert report["gpus"]["output_tokens"] == {"total": 240, "low": 240, "high": 240}
    lines = estimate_lines(report)
    assert "cluster   assumed: 1 x 8 H20 (nodes x GPUs)" in lines
    assert "expected  240 output tokens (240 to 240)" in lines
    assert any(line.startswith("cost      $") for line in lines)
    assert any("nothing was measured" in line for line in lines)
    json.dumps(report)


@pytest.mark.usefixtures("local_ray")
def test_a_clusters_nodes_are_what_is_planned_for(mixtral: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"source": str(mixtral), "dtype": "bfloat16"}}
    text = spec_text(write_prompts(tmp_path / "in.parquet", 40), tmp_path / "out", **sections)
    spec = parse_spec(text, name="job.yaml", overrides=["fleet=auto"])
    with extra_nodes() as nodes:
        nodes.add("H100", 4)
        machines = machines_of(spec, [], "auto")
        assert machines.where.startswith(f"at auto: 1 node with 4 GPUs (H100), 1 node with {NUM_CPUS} CPUs and no GPU")
        report = estimate(prepare(spec, weights=False), sample_rows=100, machines=machines)
        [pool] = report["gpus"]["pools"]
        assert (pool["gpu"], pool["tensor_parallel"], pool["replicas"]) == ("H100-80G", 2, 2)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"gpu": "T4", "tensor_parallel": 8}, "T4 can't compute in bfloat16"),
        ({"gpu": "H100-80G"}, "use tensor_parallel=2"),
    ],
)
def test_a_run_on_gpus_that_can_not_hold_the_model_is_refused_before_anything_is_read(
    mixtral: Path, tmp_path: Path, pool: dict[str, Any], message: str
) -> None:
    sections: dict[str, Any] = {"model": {"source": str(mixtral), "dtype": "bfloat16"}, "fleet": {"pools": [pool]}}
    text = spec_text(write_prompts(tmp_path / "in.parquet", 5), tmp_path / "out", **sections)
    with pytest.raises(SpecError, match=message) as caught:
        run_job(prepare(parse_spec(text, name="job.yaml")), RunOptions(quiet=True), say=lambda line: None)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_command_line_prints_the_plan_and_refuses_with_exit_code_2(mixtral: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"source": str(mixtral), "dtype": "bfloat16"}}
    (tmp_path / "job.yaml").write_text(
        spec_text(write_prompts(tmp_path / "in.parquet", 5), tmp_path / "out", **sections)
    )

    def plan(*words: str) -> subprocess.CompletedProcess[str]:
        """`tramontane plan job.yaml WORDS`."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [str(PROGRAM), "plan", "job.yaml", *words]
        return subprocess.run(
            command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    shown = plan("--assume", "H100-80G:8x4", "--assume", "T4:4x1", "--set", "fleet=auto")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert (
        "\nwhy       H100-80G: tensor_parallel=2, 43.5 GiB of bfloat16 weights a GPU, is the smallest" in shown.stdout
    )
    assert "\nrefused   H100-80G: tensor_parallel=3, 5, 6, 7 doesn't divide the model's 32 atten" in shown.stdout
    assert "\nrefused   T4: T4 can't compute in bfloat16" in shown.stdout
    assert "GPU-hours on 32 GPUs" in shown.stdout
    assert "\ncluster " not in plan().stdout, "it runs on CPUs"
    bare = plan("--set", "fleet.pools=[{gpu: H100-80G, tensor_parallel: 2}]")
    assert "\ncluster   none was looked at; name one with --ray ADDRESS" in bare.stdout
    for words, message in [
        (("--assume", "H100-80G"), "is not TYPE:GPUSxNODES"),
        (("--set", "fleet.pools=[{gpu: T4}]"), "T4 can't compute in bfloat16"),
    ]:
        refused = plan(*words)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert message in refused.stderr
