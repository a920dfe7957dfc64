"""Where two runs of one model part ways, and how near the other way was, by transformers in float32.

Sums of many numbers depend on their order in the last bits, and tensor parallelism adds in another one. A run may then
take the other of two tokens, or experts, whose scores differ by no more than these bits; the rest of its text follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.whole_runs import read_output

TIE = 1e-4
"""Scores this near to each other are a tie. In float32, tiny Mixtral's logits from vLLM with one and with two workers
and from transformers differ by up to about 1e-5."""

ExpertIds = npt.NDArray[np.uint8]
"""Of one row: tokens x layers x top_k, first choice first, for every token but the last."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of one row, its own greedy continuation being the row's completion."""

    next_token: list[npt.NDArray[np.float32]]
    """Per token, last included: logits of the token after it."""
    router: npt.NDArray[np.float32]
    """tokens x layers x experts, logits."""


def scores_of(model: Any, prompt: list[int], generated: int) -> Scores:
    """Continue the prompt greedily by so many tokens, with transformers' model in float32."""
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(generated):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        output = model(ids[:, :-1], output_router_logits=True)
    return Scores(list(output.logits[0].numpy()), torch.stack(output.router_logits, dim=1).numpy())


def gap_at_parting(one: ExpertIds, two: ExpertIds, scores: Scores, num_prompt: int) -> float:
    """How much better than the other way the model liked the one that it took, where two completions first differ.

    Experts of a completion's token differ when the token does, so that either of both may have been the tie.
    """
    shared = min(len(one), len(two))
    differ = np.argwhere((one[:shared] != two[:shared]).any(axis=-1))
    if not len(differ):  # then it is the token after those that both have
        return _token_gap(scores.next_token[shared - 1])
    token, layer = (int(each) for each in differ[0])
    choice = int(np.argwhere(one[token, layer] != two[token, layer])[0, 0])
    logits = scores.router[token, layer]
    gaps = [abs(float(logits[one[token, layer, choice]]) - float(logits[two[token, layer, choice]]))]
    if token >= num_prompt:
        gaps.append(_token_gap(scores.next_token[token - 1]))
    return min(gaps)


def _token_gap(logits: npt.NDArray[np.float32]) -> float:
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)


def differing_rows(one: Path, two: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of two outputs with `routing.level: tokens` whose text or experts, in order, aren't the same."""
    columns = ["input_row", "num_input_tokens", "num_generated_tokens", "generated_text", "routing"]
    pairs = zip(*(read_output(output).select(columns).to_pylist() for output in (one, two)), strict=True)
    return [(a, b) for a, b in pairs if (a["generated_text"], _ids(a)) != (b["generated_text"], _ids(b))]


def agreement(one: Path, two: Path) -> float:
    """Share of rows that are the same in two such outputs."""
    return 1 - len(differing_rows(one, two)) / len(read_output(one))


def _ids(row: dict[str, Any]) -> bytes:
    return bytes(row["routing"]["expert_ids"])


def check_only_ties_differ(model_path: str, prompts: list[list[int]], one: Path, two: Path) -> int:
    """Assert that rows of two greedy outputs are the same, or part where the model had a tie; returns how many part."""
    import torch
    from transformers import MixtralForCausalLM

    differing = differing_rows(one, two)
    if not differing:
        return 0
    model = MixtralForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for a, b in differing:
        prompt = prompts[a["input_row"]]
        scores = scores_of(model, prompt, max(a["num_generated_tokens"], b["num_generated_tokens"]))
        shape = (-1, *scores.router.shape[1:2], model.config.num_experts_per_tok)
        experts = [np.frombuffer(_ids(row), np.uint8).reshape(shape) for row in (a, b)]
        gap = gap_at_parting(experts[0], experts[1], scores, len(prompt))
        assert gap < TIE, f"row {a['input_row']} differs, where the model preferred one way by {gap:g}"
    return len(differing)
