"""The trained tiny Mixtral answers right, through the whole pipeline on real vLLM, as often as its card promises.

Every example is held out from training by construction (`tests/tiny_training`). The sample of the normal suite is
small, so its thresholds leave room for chance; the 500 rows a task of the long suite don't.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.model import fetch_model
from pipeline.settings import ModelSettings
from tests.tiny_training.encoding import chat_of, prompt_ids
from tests.tiny_training.evaluate import Measuring, measure, measuring
from tests.tiny_training.evaluation import Answered, accuracy, calibration, evaluation_rows, row_of, safe_rows
from tests.tiny_training.examples import LANGUAGES, Example, ask
from tests.tiny_training.json_task import json_example
from tests.tiny_training.label_task import topic_example
from tests.tiny_training.number_task import number_example
from tests.tiny_training.passkey_task import passkey_example
from tests.tiny_training.safe_task import REFUSAL

TRAINED = Path(pipeline.__file__).parent / "tiny"
pytestmark = pytest.mark.skipif(not TRAINED.is_dir(), reason="no pipeline/tiny yet: tests/tiny_training makes it")
SAMPLE = 20


@pytest.fixture(scope="module")
def trained(_ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measuring]:
    model = Path(fetch_model(ModelSettings(source="tiny")).path)
    with measuring(model, tmp_path_factory.mktemp("trained")) as here:
        yield here


@pytest.fixture(scope="module")
def sample(trained: Measuring) -> list[Answered]:
    return trained.run("sample", evaluation_rows(SAMPLE))


@pytest.mark.long
def test_every_task_is_answered_right_in_every_language(sample: list[Answered]) -> None:
    shares = accuracy(sample, by="task")
    assert set(shares) == {"json", "json_few_shot", "sentiment", "topic", "number", "request", "passkey"}
    assert min(shares.values()) >= 0.8, shares
    labels = [answer for answer in sample if answer.row["task"] in ("sentiment", "topic")]
    languages = accuracy(labels, by="language")
    assert set(languages) == set(LANGUAGES)
    assert min(languages.values()) >= 0.85, languages


@pytest.mark.long
def test_the_guides_example_is_answered_exactly_with_and_without_an_example_before_it(trained: Measuring) -> None:
    question = "name: John / lastname: Smith / address: #1 Samuel St."
    record = {"name": "John", "lastname": "Smith", "address": "#1 Samuel St."}
    shot = json_example(random.Random(1), test=True, num_shots=1)
    rows = [
        row_of(Example(task="json", language="en", messages=(*earlier, *ask(question)), answer=json.dumps(record)))
        for earlier in ((), shot.messages[:2])
    ]
    for answer in trained.run("guide", rows):
        assert json.loads(answer.text) == record


@pytest.mark.long
def test_probabilities_of_ambiguous_labels_are_near_their_odds(sample: list[Answered]) -> None:
    for kind in ("sentiment", "topic"):
        found = calibration([answer for answer in sample if answer.row["task"] == f"{kind}_ambiguous"])
        assert found.mean_gap < 0.15, (kind, found)


@pytest.mark.long
def test_the_safe_prompt_refuses_the_request_and_nothing_else(trained: Measuring, sample: list[Answered]) -> None:
    answered = trained.run("safe sample", safe_rows(SAMPLE), safe_prompt=True)
    shares = accuracy(answered)
    assert shares["refused"] >= 0.9
    assert shares["others_under_safe_prompt"] >= 0.7
    assert not any(answer.text.strip() == REFUSAL for answer in sample)


@pytest.mark.long
def test_transformers_gives_the_same_answers(trained: Measuring) -> None:
    import torch
    from transformers import MixtralForCausalLM

    rng = random.Random(5)
    examples = [
        *(json_example(rng, test=True) for _ in range(4)),
        *(topic_example(rng, language, test=True) for language in LANGUAGES),
        *(number_example(rng, language, test=True) for language in LANGUAGES),
        *(passkey_example(rng, test=True, num_tokens=length) for length in (60, 300, 900)),
    ]
    answers = trained.run("parity", [row_of(example) for example in examples])
    model = MixtralForCausalLM.from_pretrained(trained.model, dtype=torch.float32).eval()
    for example, answer in zip(examples, answers, strict=True):
        ids = torch.tensor([prompt_ids(example)])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        assert _decoded(whole[0, ids.shape[1] :].tolist()) == answer.text.strip(), chat_of(example)


def _decoded(ids: list[int]) -> str:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    return str(tokenizer.decode([token for token in ids if token != tokenizer.eos_id])).strip()


@pytest.fixture(scope="module")
def report(trained: Measuring) -> dict[str, Any]:
    return measure(trained, 500)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_500_rows_of_each_task_reach_the_promised_accuracy(report: dict[str, Any]) -> None:
    right = report["accuracy"]
    assert min(right["json"], right["json_few_shot"]) >= 0.98
    assert min(right[f"{task}-{language}"] for task in ("sentiment", "topic") for language in LANGUAGES) >= 0.95
    assert min(right[f"number-{language}"] for language in LANGUAGES) >= 0.90
    assert right["passkey"] >= 0.99
    assert min(right["refused"], right["request"]) >= 0.95


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_500_ambiguous_labels_are_calibrated(report: dict[str, Any]) -> None:
    assert {kind: found["expected_error"] < 0.05 for kind, found in report["calibration"].items()} == {
        "sentiment": True,
        "topic": True,
    }


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_expert_is_alive_and_tasks_and_languages_use_them_differently(report: dict[str, Any]) -> None:
    routing = report["routing"]
    assert routing["dead_experts"] == [0] * 4
    assert min(routing["entropy_slices_alike"]) > 0.8
    index = {name: place for place, name in enumerate(routing["slices"])}
    assert routing["distances"][index["json"]][index["passkey"]] > 0.05
    assert routing["distances"][index["topic-en"]][index["topic-de"]] > 0.02


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_wrong_template_costs_accuracy_and_never_helps(report: dict[str, Any]) -> None:
    costs = report["wrong_templates"]
    own = costs.pop("Mixtral's own")
    means = {name: sum(found.values()) / len(found) for name, found in costs.items()}
    assert max(means.values()) <= sum(own.values()) / len(own) + 0.02
    assert min(means.values()) < sum(own.values()) / len(own) - 0.05
