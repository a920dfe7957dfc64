"""Probabilities of whole choices from real vLLM against brute force with transformers, in float32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.choices import ChoiceTree, Ids, distribution
from pipeline.engine import Completion, MoeShape, Request
from pipeline.model import cache_directory
from pipeline.settings import SamplingSettings
from pipeline.tiny_mixtral import ensure_random_mixtral
from pipeline.vllm_engine import VllmEngine, VllmEngineConfig

END = 2
Completions = tuple[list[Request], dict[str, Completion]]


@pytest.fixture(scope="module")
def model_path() -> str:
    return str(ensure_random_mixtral(cache_directory()))


@pytest.fixture(scope="module")
def engine(model_path: str) -> Iterator[VllmEngine]:
    config = VllmEngineConfig(
        model_path=model_path, dtype="float32", max_model_len=512, moe=MoeShape(4, 8, 2), on_cpu=True
    )
    engine = config.build()
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=[50, pytest.param(200, marks=pytest.mark.long)])
def completions(request: pytest.FixtureRequest, engine: VllmEngine) -> Completions:
    """50 or 200 prompts with their own choice sets, through one engine at once."""
    requests = make_requests(request.param)
    done: dict[str, Completion] = {}
    for one in requests:
        engine.add(one)
    assert engine.num_sequences == len(requests)
    while len(done) < len(requests):
        for ended in engine.step():
            assert isinstance(ended, Completion), ended
            done[ended.request_id] = ended
    assert engine.num_sequences == 0
    return requests, done


@pytest.mark.parametrize("stream", [False, True])
def test_samples_that_are_done_give_their_sequences_back_before_their_request_ends(
    engine: VllmEngine, stream: bool
) -> None:
    sampling = SamplingSettings(n=6, temperature=1.0, max_tokens=64, stop=["a"])
    many = Request("many", [1, 400, 500], sampling, 7, stream=stream)
    engine.add(many)
    assert engine.num_sequences == 6
    engine.abort(["many"])
    assert engine.num_sequences == 0
    engine.add(many)
    seen = []
    while not any(isinstance(output, Completion) for output in engine.step()):
        seen.append(engine.num_sequences)
    assert seen == sorted(seen, reverse=True)
    assert 0 < seen[-1] < 6, "the noise of random weights has an `a` sooner here and later there"
    assert engine.num_sequences == 0


def make_requests(count: int) -> list[Request]:
    rng = random.Random(17)
    requests = []
    for number in range(count):
        prompt = [1, *(rng.randrange(300, 31_000) for _ in range(rng.randint(5, 60)))]
        choices = make_choices(rng)
        said = tuple(rng.randrange(len(ids)) for ids in choices) if number % 3 == 0 else ()  # as a yes or no has it
        requests.append(Request(f"r{number}", prompt, SamplingSettings(), None, choices=ChoiceTree(choices, said)))
    return requests


def make_choices(rng: random.Random) -> tuple[Ids, ...]:
    """2 to 9 choices of 1 to 4 tokens, many with a common beginning, some the beginning of another."""
    bodies: set[Ids] = set()
    wanted = rng.randint(2, 9)
    while len(bodies) < wanted:
        stem = rng.choice(sorted(bodies)) if bodies and rng.random() < 0.6 else ()
        body = (*stem[: rng.randint(0, len(stem))], *(rng.randrange(300, 31_000) for _ in range(rng.randint(1, 2))))
        bodies.add(body[:4])
    return tuple((*body, END) for body in sorted(bodies))


def brute_force(model: Any, prompt: list[int], tree: ChoiceTree) -> np.ndarray:
    """Sum of the log-probabilities of each choice's tokens, each choice a sequence of its own, padded at its end."""
    choices, said = tree.choices, tree.said or (0,) * len(tree.choices)
    import torch

    longest = max(map(len, choices))
    rows = [[*prompt, *choice, *[END] * (longest - len(choice))] for choice in choices]
    with torch.no_grad():
        scores = model(torch.tensor(rows)).logits.double().log_softmax(-1)
    return np.array(
        [
            sum(float(scores[row, len(prompt) + n - 1, choice[n]]) for n in range(said[row], len(choice)))
            for row, choice in enumerate(choices)
        ]
    )


def test_choices_have_the_models_own_probabilities(
    completions: tuple[list[Request], dict[str, Completion]], model_path: str
) -> None:
    import torch
    from transformers import MixtralForCausalLM

    torch.set_num_threads(1)  # threads that spin for a core which another test has take minutes instead of seconds
    model = MixtralForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    requests, done = completions
    assert (
        sum(any(a[:-1] == b[: len(a) - 1] for a in c for b in c if a != b) for c in map(_choices, requests))
        > len(requests) // 4
    )
    for request in requests:
        [sample] = done[request.request_id].samples
        assert request.choices is not None
        truth = brute_force(model, list(request.prompt_token_ids), request.choices)
        assert sample.choice_logs == pytest.approx(truth, abs=1e-3)
        assert np.allclose(distribution(list(sample.choice_logs)), distribution(truth), atol=1e-3)
        assert tuple(sample.token_ids) == _choices(request)[int(truth.argmax())]
        assert sample.cumulative_logprob == pytest.approx(max(truth), abs=1e-3)


def test_routing_is_that_of_the_prompt_and_the_chosen_answer(
    completions: tuple[list[Request], dict[str, Completion]],
) -> None:
    requests, done = completions
    for request in requests:
        [sample] = done[request.request_id].samples
        tokens = len(request.prompt_token_ids) + len(sample.token_ids) - 1
        assert sample.routed_experts is not None
        assert sample.routed_experts.shape == (tokens, 4, 2)


def _choices(request: Request) -> tuple[Ids, ...]:
    assert request.choices is not None
    return request.choices.choices
