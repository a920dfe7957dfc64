"""Models that are not Mixtral 8x7B v0.1, on the real engine: a dense one, another MoE, a Mixtral of the 8x22B kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.fleet import start_fleet, stop_fleet
from cluster.pools import pool_plans
from jobs.prepare import PreparedJob
from jobs.run import RunOptions, run_job
from pipeline.templating import TemplateStage
from tests.tiny_models import make_llama, make_mixtral_8x22b, make_qwen_moe
from tests.whole_runs import check_whole, make_job, read_output, results, write_prompts

TEXTS = [f"question {n} about the wind " * (1 + n % 4) for n in range(40)]


@dataclass(frozen=True)
class Served:
    """A model, and a fleet that runs it."""

    path: Path
    fleet: Any

    def job(self, folder: Path, name: str = "out", **sections: dict[str, Any]) -> PreparedJob:
        rows = write_prompts(folder / "in.parquet", len(TEXTS), text=TEXTS)
        sections.setdefault("sampling", {"max_tokens": 9})
        return make_job(rows, folder / name, model={"source": str(self.path)}, **sections)

    def run(self, folder: Path, name: str = "out", **sections: dict[str, Any]) -> dict[str, Any]:
        job = self.job(folder, name, **sections)
        return run_job(job, RunOptions(quiet=True), say=lambda line: None, fleet=self.fleet)


class Models(dict[str, Served]):
    """Served from the first time that one is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, name: str) -> Served:
        make = {"llama": make_llama, "qwen_moe": make_qwen_moe, "mixtral_8x22b": make_mixtral_8x22b}[name]
        path = make(self._folder / name)
        job = make_job(write_prompts(self._folder / "any.parquet", 1), self._folder / "no", model={"source": str(path)})
        pools = pool_plans(job.spec.fleet, job.spec.model, model_path=str(path), moe=job.moe)
        self[name] = Served(path, start_fleet(pools))
        return self[name]


@pytest.fixture(scope="module")
def served(_ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    models = Models(tmp_path_factory.mktemp("models"))
    yield models
    for model in models.values():
        stop_fleet(model.fleet)


def prompts(job: PreparedJob) -> list[str]:
    """The first rows' prompts as the model sees them."""
    stage = TemplateStage(job.template)
    table = pq.read_table(job.plan.files[0].path).slice(0, 3)
    ids = stage(table).column("_tm_prompt_token_ids").to_pylist()
    stage.close()
    return [stage.decode(row) for row in ids]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_dense_model_runs_with_routing_off_and_says_why(served: Models, tmp_path: Path) -> None:
    summary = served["llama"].run(tmp_path)
    assert summary["exit_code"] == 0
    assert summary["routing"] == {
        "level": "off",
        "off_because": "LlamaForCausalLM is a dense model: it has no router",
        "invalid_samples": 0,
    }
    assert summary["model"]["experts"] is None
    check_whole(tmp_path / "out", len(TEXTS))
    table = read_output(tmp_path / "out")
    assert table["routing"].null_count == table.num_rows == len(TEXTS)
    assert set(table["status"].to_pylist()) <= {"ok", "truncated"}
    assert all(table["num_generated_tokens"].to_pylist())
    assert not list((tmp_path / "out" / "routing").glob("*")), "routing tables of a model that has no router"


@pytest.mark.timeout(600)
def test_a_dense_models_own_chat_template_is_used(served: Models, tmp_path: Path) -> None:
    job = served["llama"].job(tmp_path, prompt={"template": "{{ text }}", "system": "be brief"})
    expected = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts(job) == [expected.format(text) for text in TEXTS[:3]]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_routing_adapts_to_another_models_layers_experts_and_top_k(served: Models, tmp_path: Path) -> None:
    summary = served["qwen_moe"].run(tmp_path)
    assert summary["exit_code"] == 0
    assert {name: summary["model"][name] for name in ("architecture", "layers", "experts", "top_k")} == {
        "architecture": "Qwen3MoeForCausalLM",
        "layers": 3,
        "experts": 6,
        "top_k": 3,
    }
    assert summary["routing"] == {"level": "counts", "off_because": None, "invalid_samples": 0}
    check_whole(tmp_path / "out", len(TEXTS))
    table = read_output(tmp_path / "out")
    assert table.schema.field("routing").type.field("prompt_expert_counts").type.list_size == 3 * 6
    for row in table.to_pylist():
        prompt, generated = row["num_input_tokens"], row["num_generated_tokens"]
        assert sum(row["routing"]["prompt_expert_counts"]) == prompt * 3 * 3
        assert sum(row["routing"]["completion_expert_counts"]) == (generated - 1) * 3 * 3
    experts = pq.read_table(tmp_path / "out" / "routing" / "experts.parquet")
    assert set(experts["layer"].to_pylist()) == {0, 1, 2}
    assert set(experts["expert"].to_pylist()) == set(range(6))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_mixtral_of_the_8x22b_kind_uses_its_own_template(served: Models, tmp_path: Path) -> None:
    from mistral_common.protocol.instruct.messages import UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    model = served["mixtral_8x22b"]
    job = model.job(tmp_path)
    assert prompts(job) == [f"<s>[INST] {text}[/INST]" for text in TEXTS[:3]]
    summary = model.run(tmp_path)
    assert summary["exit_code"] == 0
    assert summary["model"]["layers"] == 2
    check_whole(tmp_path / "out", len(TEXTS))
    official = MistralTokenizer.v3()
    for row in read_output(tmp_path / "out").to_pylist():
        request: Any = ChatCompletionRequest(messages=[UserMessage(content=TEXTS[row["input_row"]])])
        assert row["num_input_tokens"] == len(official.encode_chat_completion(request).tokens)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_other_models_reproduce_under_a_seed_too(served: Models, tmp_path: Path) -> None:
    sampling = {"temperature": 0.8, "n": 2, "max_tokens": 6, "seed": 3}
    for name in ("one", "two"):
        served["qwen_moe"].run(tmp_path, name, sampling=sampling)
    assert results(tmp_path / "one") == results(tmp_path / "two")
    assert len(results(tmp_path / "one")) == 2 * len(TEXTS)
