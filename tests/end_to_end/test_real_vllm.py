"""The real engine: vLLM on the tiny Mixtral, against transformers' own implementation of the architecture."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from jobs.run import RunOptions, run_job
from pipeline.engine import Request
from pipeline.model import ModelFiles
from pipeline.settings import SamplingSettings
from tests.near_ties import scores_of
from tests.whole_runs import check_whole, make_job, prompt_ids, read_output, results, write_prompts

WORDS = ["wind", "harbour", "seven", "copper", "lantern", "orbit", "violin", "maple", "thunder", "paper", "glass"]


def sentences(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(count)]


def run_vllm(fleet: Any, rows: Path, output: Path, **sections: Any) -> dict[str, Any]:
    job = make_job(rows, output, **sections)
    return run_job(job, RunOptions(quiet=True), say=lambda line: None, fleet=fleet)


@pytest.fixture(scope="module")
def greedy_run(vllm_fleet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 rows of greedy decoding, shared by the tests that look at it."""
    folder = tmp_path_factory.mktemp("greedy")
    rows = write_prompts(folder / "in.parquet", 120, text=sentences(120))
    summary = run_vllm(vllm_fleet, rows, folder / "out", sampling={"max_tokens": 12}, routing={"level": "tokens"})
    assert summary["exit_code"] == 0
    return folder


def reference(model: Any, prompt: list[int], generated: int) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Greedy tokens, and each token's experts in each layer, first choice first, by transformers in float32."""
    scores = scores_of(model, prompt, generated)
    tokens = [int(logits.argmax()) for logits in scores.next_token[len(prompt) - 1 :]]
    return tokens, np.argsort(-scores.router, axis=-1, kind="stable")[..., :2]


def test_what_a_replica_says_of_itself_is_read_without_torch(vllm_fleet: Any) -> None:
    """`torch.__version__` itself is of a class of torch's, which fleet, dispatch and driver would import to read it."""
    import ray

    versions = ray.get(vllm_fleet.status.remote())["versions"]
    assert versions.keys() == {"vllm", "torch", "transformers"}
    assert {type(version) for version in versions.values()} == {str}


def test_tokens_and_ordered_expert_ids_equal_transformers_row_for_row(greedy_run: Path, tiny_model: ModelFiles) -> None:
    import torch
    from transformers import AutoTokenizer, MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    shard = prompt_ids(make_job(greedy_run / "in.parquet", greedy_run / "unused"), greedy_run / "in.parquet")
    compared = 0
    for row in read_output(greedy_run / "out").to_pylist()[::3]:
        prompt, generated = shard[row["input_row"]], row["num_generated_tokens"]
        assert row["num_input_tokens"] == len(prompt)
        tokens, experts = reference(model, prompt, generated)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == row["generated_text"].strip()
        stored = np.frombuffer(row["routing"]["expert_ids"], np.uint8).reshape(-1, 4, 2)
        np.testing.assert_array_equal(stored, experts)
        compared += experts.size
    assert compared > 6_000


def test_every_routed_token_is_counted_once_and_totals_are_the_sum_over_rows(greedy_run: Path) -> None:
    check_whole(greedy_run / "out", 120)
    rows = read_output(greedy_run / "out").to_pylist()
    total = 0
    for row in rows:
        counted = sum(row["routing"]["prompt_expert_counts"]) + sum(row["routing"]["completion_expert_counts"])
        assert counted == (row["num_input_tokens"] + row["num_generated_tokens"] - 1) * 4 * 2
        total += counted
    experts = pq.read_table(greedy_run / "out" / "routing" / "experts.parquet")
    assert sum(experts["selections"].to_pylist()) == total
    summary = json.loads((greedy_run / "out" / "summary.json").read_text())
    assert summary["model"] | {"layers": 4, "experts": 8, "top_k": 2, "source": "random"} == summary["model"]
    assert Path(summary["model"]["path"], "config.json").is_file()


def test_the_same_run_twice_is_the_same_also_when_sampled_and_batched_otherwise(
    vllm_fleet: Any, tmp_path: Path
) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 70, text=sentences(70, seed=2))
    sampling = {"temperature": 0.9, "n": 2, "max_tokens": 8, "seed": 7}
    run_vllm(vllm_fleet, rows, tmp_path / "a", sampling=sampling)
    few = tmp_path / "few"
    few.mkdir()
    pq.write_table(pq.read_table(rows).slice(0, 5), few / "in.parquet")
    run_vllm(vllm_fleet, few / "in.parquet", few / "out", sampling=sampling)
    whole = {identity[1:]: values for identity, values in results(tmp_path / "a").items()}
    part = {identity[1:]: values for identity, values in results(few / "out").items()}
    assert len(part) == 10
    assert part == {identity: whole[identity] for identity in part}


def test_n_samples_with_unequal_lengths_and_per_row_sampling(vllm_fleet: Any, tmp_path: Path) -> None:
    overrides = [None, '{"max_tokens": 3}', '{"temperature": 0, "n": 1}', '{"stop": ["e"], "max_tokens": 40}'] * 5
    rows = write_prompts(tmp_path / "in.parquet", 20, text=sentences(20, seed=3), knobs=overrides)
    sampling = {"temperature": 1.0, "n": 4, "max_tokens": 10, "column": "knobs", "seed": 1}
    run_vllm(vllm_fleet, rows, tmp_path / "out", sampling=sampling)
    table = read_output(tmp_path / "out").to_pylist()
    by_row: dict[int, list[dict[str, Any]]] = {}
    for sample in table:
        by_row.setdefault(sample["input_row"], []).append(sample)
    assert [len(by_row[n]) for n in range(4)] == [4, 4, 1, 4]
    assert all(s["num_generated_tokens"] == 3 and s["status"] == "truncated" for s in by_row[1])
    stopped = [s for n in range(3, 20, 4) for s in by_row[n] if s["finish_reason"] == "stop"]
    assert stopped, "no sample met its stop string"
    assert all(s["stop_reason"] == "e" and s["status"] == "ok" and "e" not in s["generated_text"] for s in stopped)
    assert len({s["num_generated_tokens"] for n in range(3, 20, 4) for s in by_row[n]}) > 3
    check_whole(tmp_path / "out", 20)


def test_what_the_engine_refuses_is_a_failed_row(vllm_fleet: Any, tmp_path: Path) -> None:
    # 512 stop strings are legal for us and for JSON; what the engine won't take fails alone.
    overrides = [None] * 9 + ['{"min_tokens": 500, "max_tokens": 501}']
    rows = write_prompts(tmp_path / "in.parquet", 10, knobs=overrides)
    run_vllm(vllm_fleet, rows, tmp_path / "out", sampling={"column": "knobs"}, limits={"max_failed_fraction": 0.2})
    statuses = [row["status"] for row in read_output(tmp_path / "out").to_pylist()]
    assert statuses.count("failed") == 1


class Line:
    """Requests straight to the fleet's one replica, and the order in which they finish."""

    def __init__(self, fleet: Any) -> None:
        members: dict[str, Any] = {}
        while not members:
            members = ray.get(fleet.watch.remote(0, 5.0)).members
        [self._member] = members.values()
        self.seats = self._member.info.max_num_seqs
        self.finished: list[str] = []

    def submit(self, name: str, count: int, *, max_tokens: int, priority: int) -> None:
        sampling = SamplingSettings(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        prompts = enumerate([1, 300 + n, 400] for n in range(count))
        requests = [Request(f"line/{name}-{n}", prompt, sampling, None, priority) for n, prompt in prompts]
        ray.get(self._member.handle.submit.remote(requests))

    def wait_for(self, name: str, count: int) -> None:
        while sum(request_id.startswith(f"line/{name}-") for request_id in self.finished) < count:
            poll = ray.get(self._member.handle.poll.remote("line", 5.0))
            assert not [result.failure for result in poll.results if result.failure]
            self.finished += [result.request_id for result in poll.results]

    def end(self) -> None:
        ray.get(self._member.handle.cancel.remote("line"))


def test_a_request_of_lower_priority_value_gets_the_next_free_seat_in_the_engine(vllm_fleet: Any) -> None:
    line = Line(vllm_fleet)
    line.submit("soon", 4, max_tokens=2, priority=5)
    line.submit("later", 8, max_tokens=16, priority=5)
    line.submit("long", line.seats - 12, max_tokens=40, priority=5)
    line.submit("waiting", 16, max_tokens=40, priority=5)
    line.wait_for("soon", 4)
    # At most four who waited have the seats of `soon`. Eight are free with `later`, then none until `long` ends.
    line.submit("urgent", 8, max_tokens=2, priority=1)
    line.wait_for("urgent", 8)
    line.end()
    finished = {request_id.split("/")[1].split("-")[0] for request_id in line.finished}
    assert finished <= {"soon", "later", "urgent"}, "those who waited already went first"


def test_repetition_on_random_routing_is_what_chance_predicts(tmp_path: Path, local_ray: None) -> None:
    """Table 5 of the Mixtral paper: 12.5% of first choices and 46.4% of pairs repeat when routing is random."""
    from tests.whole_runs import run_scripted

    rows = write_prompts(tmp_path / "in.parquet", 400, text=sentences(400, seed=4))
    from tests.scripted_engine import ScriptedConfig
    from tests.whole_runs import TINY_MOE

    run_scripted(make_job(rows, tmp_path / "out"), ScriptedConfig(moe=TINY_MOE, random_routing=True))
    layers = pq.read_table(tmp_path / "out" / "routing" / "layers.parquet").to_pylist()
    whole = [row for row in layers if row["phase"] == "all"]
    assert len(whole) == 4
    for row in whole:
        error = 4 * math.sqrt(0.25 / row["tokens"])
        assert abs(row["repeat_first"] - 0.125) < error
        assert abs(row["repeat_any"] - (1 - 15 / 28)) < error
