"""One request that chooses, as several probes: put together when all have answered, ended by the first that fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.choice_requests import Answer, OpenChoices
from pipeline.choices import ChoiceTree
from pipeline.engine import UNKNOWN_TIMING, Completion, Failure, Request
from pipeline.settings import SamplingSettings
from pipeline.vllm_engine import VllmEngine
from pipeline.vllm_streams import OpenStreams

END = 2
TREE = ChoiceTree(((10, END), (10, 11, END), (12, END)))
"""Asked after (), (10,), (10, 11) and (12,): the first two branch, so that two more probes may not be needed."""


def request(name: str) -> Request:
    return Request(name, [1, 5, 6], SamplingSettings(), None, choices=TREE)


def answer(**logs: float) -> Answer:
    return Answer({int(token[1:]): log for token, log in logs.items()}, None, 0, UNKNOWN_TIMING)


def uniform(tokens: tuple[int, ...]) -> Answer:
    return answer(**{f"t{token}": -float(np.log(len(tokens))) for token in tokens})


def test_a_request_is_complete_with_its_last_probe_whatever_their_order() -> None:
    choices = OpenChoices()
    probes = [*choices.open(request("a"), TREE), *choices.open(request("b"), TREE)]
    assert len({probe.probe_id for probe in probes}) == len(probes)
    assert all(probe.prompt_token_ids[:3] == [1, 5, 6] for probe in probes)
    ended: dict[str, Completion] = {}
    for probe in reversed(probes):
        assert probe.probe_id in choices
        completion = choices.answer(probe.probe_id, uniform(probe.tokens))
        if completion is not None:
            ended[completion.request_id] = completion
    assert sorted(ended) == ["a", "b"]
    assert not any(probe.probe_id in choices for probe in probes)
    logs = ended["a"].samples[0].choice_logs
    assert logs is not None
    assert np.exp(logs).sum() == pytest.approx(1)


def test_a_forgotten_request_names_its_probes_and_is_unknown_afterwards() -> None:
    choices = OpenChoices()
    probes = [probe.probe_id for probe in choices.open(request("a"), TREE)]
    assert choices.forget(["a", "unknown"]) == probes
    assert choices.forget(["a"]) == []
    assert probes[0] not in choices


def output_of(probe_id: str, finish_reason: str) -> Any:
    """What vLLM says of a probe."""
    sample = SimpleNamespace(finish_reason=finish_reason, index=0)
    return SimpleNamespace(request_id=probe_id, outputs=[sample], finished=True, num_cached_tokens=0, metrics=None)


def test_a_probe_that_fails_ends_its_request_alone_and_takes_the_other_probes_back() -> None:
    aborted: list[str] = []
    engine = object.__new__(VllmEngine)  # without vLLM: only what becomes of its outputs is looked at
    engine._choices, engine._streams, engine._logged, engine._layers = OpenChoices(), OpenStreams([0]), set(), [0]
    steps: list[list[Any]] = []
    engine._engine = SimpleNamespace(
        abort_request=aborted.extend, has_unfinished_requests=lambda: True, step=lambda: steps.pop(0)
    )
    first, second, *rest = [probe.probe_id for probe in engine._choices.open(request("a"), TREE)]
    others = [probe.probe_id for probe in engine._choices.open(request("b"), TREE)]
    steps.append([output_of(first, "error"), output_of(second, "error")])
    [failure] = engine.step()
    assert failure == Failure("a", "request_error", "the engine ended the request with 'error'")
    assert {second, *rest} <= set(aborted)
    assert not set(aborted) & set(others)
    assert all(probe in engine._choices for probe in others)
