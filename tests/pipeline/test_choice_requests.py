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
from pipeline.vllm_requests import VllmRequests

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


def answer_of(probe_id: str, tokens: tuple[int, ...]) -> Any:
    """Likewise, of one that went well; all tokens are equally likely."""
    logs = {token: SimpleNamespace(logprob=-float(np.log(len(tokens)))) for token in tokens}
    text = {"text": "", "token_ids": (tokens[0],), "stop_reason": None, "cumulative_logprob": 0.0}
    sample = SimpleNamespace(finish_reason="length", index=0, logprobs=[logs], routed_experts=None, **text)
    return SimpleNamespace(request_id=probe_id, outputs=[sample], finished=True, num_cached_tokens=0, metrics=None)


def test_a_probe_that_fails_ends_its_request_alone_and_takes_the_other_probes_back() -> None:
    requests = VllmRequests([0])
    first, second, *rest = [probe.probe_id for probe in requests.open_choice(request("a"))]
    others = [probe.probe_id for probe in requests.open_choice(request("b"))]
    taken = requests.take([output_of(first, "error"), output_of(second, "error")])
    assert taken.results == [Failure("a", "request_error", "the engine ended the request with 'error'")]
    assert {second, *rest} <= set(taken.stale)
    assert not set(taken.stale) & set(others)
    assert requests.forget(["b"]) == ["b", *others]


def test_a_choice_takes_one_sequence_however_many_of_its_probes_are_unanswered() -> None:
    requests = VllmRequests([0])
    probes = [requests.open_choice(request(name)) for name in ("a", "b")]
    unfinished = sum(map(len, probes))
    assert requests.num_sequences(unfinished) == 2
    assert requests.num_sequences(unfinished + 4) == 6, "four samples of others"
    taken = requests.take([output_of(probes[0][0].probe_id, "error")])
    assert requests.num_sequences(unfinished - len(probes[0])) == 1
    assert len(taken.results) == 1
    answered = probes[1][0]
    requests.take([answer_of(answered.probe_id, answered.tokens)])
    assert requests.num_sequences(len(probes[1]) - 1) == 1
    requests.forget(["b"])
    assert requests.num_sequences(0) == 0
