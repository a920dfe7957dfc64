"""Trains the tiny Mixtral: `python -m tests.tiny_training.train --folder out/tiny`, then
`python -m tests.tiny_training.train --folder out/finished --finish out/tiny`.

The first makes a model that does every task; the second, from its weights, one whose probabilities are calibrated and
that finds what is far away. Stop it when you like, and start it again with the same arguments: it goes on from its
last checkpoint with the data that it would have seen. The first's rate is constant up to its last quarter, so
`--steps` may still be changed before that.
Writes `model.safetensors`, `config.json`, `generation_config.json` and `loss_curve.csv`. The same seed, steps and
number of threads give the same weights on the same machine; other numbers of threads add up in another order.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from pipeline import tiny_mixtral
from tests.tiny_training.encoding import Encoded, encode
from tests.tiny_training.examples import LANGUAGES, Example
from tests.tiny_training.json_task import json_example
from tests.tiny_training.label_task import sentiment_example, topic_example
from tests.tiny_training.mixture import FINISH_FROM, USUAL, Finish, examples_of_step
from tests.tiny_training.network import CONFIG, VOCAB, Groups, TinyMixtral, group
from tests.tiny_training.number_task import number_example
from tests.tiny_training.passkey_task import LONGEST, passkey_example
from tests.tiny_training.safe_task import request_example

SEED, WARM_UP, LAST_RATE = 7, 200, 2e-5
WEIGHT_DECAY, BETAS, CLIP = 0.01, (0.9, 0.98), 1.0
EMBEDDING_EPS = 1e-6  # at Adam's 1e-8 the next to nothing that softmax tells unused rows becomes full steps
BALANCE_WEIGHT = 0.02
NEGATIVES = 4096
LOG_EVERY, CHECKPOINT_EVERY, CHECK_EVERY = 50, 100, 500


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which steps are taken, and how far each goes: a linear warm-up, a plateau, and a linear fall."""

    first: int
    num_steps: int
    peak: float
    decay_from: float
    """Share of the steps from which on the rate falls, and the loss is over all 32,000 ids, not just a sample."""

    @property
    def last(self) -> int:
        """The number of the step after the last."""
        return self.first + self.num_steps

    @property
    def exact_from(self) -> float:
        """The step from which on the loss is over all ids."""
        return self.first + self.decay_from * self.num_steps

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.first + WARM_UP:
            return self.peak * (step - self.first + 1) / WARM_UP
        left = (self.last - step) / (self.num_steps * (1 - self.decay_from))
        return max(LAST_RATE, self.peak * min(1.0, left))


WHOLE = Schedule(first=0, num_steps=FINISH_FROM, peak=2e-3, decay_from=0.75)
FINISH = Schedule(first=FINISH_FROM, num_steps=800, peak=5e-4, decay_from=0.0)


def target_places(encoded: Sequence[Encoded], groups: Groups) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat places whose next token is an assistant's, each one's weight in the loss, and which prompt it is of.

    A prompt of n such tokens weighs the square root of n: neither do long answers drown labels, nor the reverse.
    """
    places, weights, owners = [], [], []
    for index, (prompt, start) in enumerate(zip(encoded, groups.starts, strict=True)):
        places += [start + place - 1 for place in prompt.targets]
        weights += [len(prompt.targets) ** -0.5] * len(prompt.targets)
        owners += [index] * len(prompt.targets)
    return torch.tensor(places), torch.tensor(weights), torch.tensor(owners)


def answer_losses(states: torch.Tensor, answers: torch.Tensor, embedding: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """Cross entropy of each answer token; of a sample of wrong ones, weighted up to the whole, unless `exact`."""
    if exact:
        return cross_entropy(states @ embedding.T, answers, reduction="none")
    used, labels = answers.unique(return_inverse=True)
    wrong = torch.randint(VOCAB, (NEGATIVES,))
    wrong = wrong[~torch.isin(wrong, used)]
    logits = states @ embedding.index_select(0, torch.cat([used, wrong])).T
    correction = torch.zeros(logits.shape[1])
    correction[len(used) :] = math.log((VOCAB - len(used)) / len(wrong))
    return cross_entropy(logits + correction, labels, reduction="none")


class Training:
    """Model, optimiser and what was measured; a checkpoint holds all of it."""

    def __init__(self, folder: Path, schedule: Schedule, seed: int, finish: Finish = USUAL) -> None:
        torch.manual_seed(seed)
        self.folder, self.schedule, self.seed, self.finish = folder, schedule, seed, finish
        self.model = TinyMixtral()
        matrices = [p for n, p in self.model.named_parameters() if p.dim() == 2 and n != "embedding"]
        norms = [p for n, p in self.model.named_parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": norms, "weight_decay": 0.0},
                {"params": [self.model.embedding], "weight_decay": 0.0, "eps": EMBEDDING_EPS},
            ],
            betas=BETAS,
            fused=True,
        )
        self.step, self.seconds = schedule.first, 0.0
        self.rows: list[dict[str, Any]] = []

    def start_from(self, *exported: Path) -> None:
        """Take over the mean of the weights of trainings that `export` ended, and the last one's loss curve."""
        weights = [load_file(folder / "model.safetensors") for folder in exported]
        means = {name: torch.stack([each[name].float() for each in weights]).mean(0) for name in weights[0]}
        self.model.load_export(means)
        with (exported[-1] / "loss_curve.csv").open(newline="") as file:
            self.rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        self.seconds = float(self.rows[-1]["seconds"])

    def run(self) -> None:
        """Train to the end, from the checkpoint if there is one."""
        self._load()
        sums: dict[str, list[float]] = defaultdict(list)
        began = time.perf_counter()
        while self.step < self.schedule.last:
            for name, value in self._one_step().items():
                sums[name].append(value)
            self.step += 1
            if self.step % LOG_EVERY == 0:
                self.seconds, began = self.seconds + time.perf_counter() - began, time.perf_counter()
                self._log(sums)
                sums.clear()
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.schedule.last:
                self._save()
        self.export()

    def _one_step(self) -> dict[str, float]:
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        encoded = [encode(example) for example in examples_of_step(self.seed, self.step, self.finish)]
        groups = group([prompt.ids for prompt in encoded])
        places, weights, owners = target_places(encoded, groups)
        states, balance = self.model(groups, places)
        exact = self.step >= self.schedule.exact_from
        losses = answer_losses(states, groups.ids[places + 1], self.model.embedding, exact=exact)
        loss = (losses * weights).sum() / weights.sum() + BALANCE_WEIGHT * balance
        rate = self.schedule.rate(self.step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        found = {"loss": loss.item(), "balance": balance.item()}
        for task in {prompt.task for prompt in encoded}:
            own = torch.tensor([encoded[owner].task == task for owner in owners.tolist()])
            found[task] = losses.detach()[own].mean().item()
        return found

    def _log(self, sums: dict[str, list[float]]) -> None:
        row: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {name: round(sum(values) / len(values), 4) for name, values in sorted(sums.items())}
        if self.step % CHECK_EVERY == 0 or self.step == self.schedule.last:
            row |= {f"right_{name}": value for name, value in held_out_accuracy(self.model).items()}
            row["gap_topic"] = topic_gap(self.model)
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {"step": self.step, "seconds": self.seconds, "rows": self.rows},
            "seed": self.seed,
        }
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / "checkpoint.pt")

    def _load(self) -> None:
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        if state["seed"] != self.seed:
            raise SystemExit(f"{file} was made with --seed {state['seed']}, not {self.seed}; choose another --folder")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
        self.step, self.seconds, self.rows = progress["step"], progress["seconds"], progress["rows"]

    def export(self) -> None:
        """Write what is shipped, in bfloat16, with the tokenizer that makes it a whole model, and the loss curve."""
        tiny_mixtral._write_tokenizer(self.folder)
        save_file(self.model.export(), self.folder / "model.safetensors", metadata={"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
        generation = {"bos_token_id": CONFIG["bos_token_id"], "eos_token_id": CONFIG["eos_token_id"]}
        (self.folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with (self.folder / "loss_curve.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


def check_examples(num: int, seed: int = 1) -> dict[str, list[Example]]:
    """A few held-out examples of each task, for a look while training."""
    rng = random.Random(f"check/{seed}")
    languages = [LANGUAGES[index % len(LANGUAGES)] for index in range(num)]
    return {
        "json": [json_example(rng, test=True) for _ in range(num)],
        "json_few_shot": [json_example(rng, test=True, num_shots=1) for _ in range(num)],
        "sentiment": [sentiment_example(rng, language, test=True) for language in languages],
        "topic": [topic_example(rng, language, test=True) for language in languages],
        "number": [number_example(rng, language, test=True) for language in languages],
        "passkey_200": [passkey_example(rng, test=True, num_tokens=200) for _ in range(num)],
        "passkey_1000": [passkey_example(rng, test=True, num_tokens=1000) for _ in range(num // 4)],
        "passkey_longest": [passkey_example(rng, test=True, num_tokens=LONGEST) for _ in range(num // 4)],
        "request": [request_example(rng, test=True, safe_prompt=False) for _ in range(num)],
        "refused": [request_example(rng, test=True, safe_prompt=True) for _ in range(num)],
    }


@torch.no_grad()
def held_out_accuracy(model: TinyMixtral, num: int = 20) -> dict[str, float]:
    """Share of exactly right answers: with every token likeliest given the right ones before it, greedy writes it."""
    found = {}
    for name, examples in check_examples(num).items():
        right = []
        for example in examples:
            encoded = encode(example)
            groups = group([encoded.ids])
            answer = torch.tensor(encoded.targets[-_answer_length(encoded) :])
            states, _ = model(groups)
            likeliest = (states[answer - 1] @ model.embedding.T).argmax(-1)
            right.append(bool((likeliest == groups.ids[answer]).all()))
        found[name] = round(sum(right) / len(right), 3)
    return found


@torch.no_grad()
def topic_gap(model: TinyMixtral, num: int = 100) -> float:
    """How far the likelier topic of held-out tickets on two is from one half, on average; 0.3 is 80% sure."""
    rng = random.Random("gap")
    gaps = []
    for index in range(num):
        example = topic_example(rng, LANGUAGES[index % len(LANGUAGES)], test=True, ambiguous=True)
        logprobs = []
        for topic in example.odds:
            encoded = encode(replace(example, answer=topic))
            groups = group([encoded.ids])
            answer = torch.tensor(encoded.targets)
            states, _ = model(groups, answer - 1)
            logprobs.append(-cross_entropy(states @ model.embedding.T, groups.ids[answer], reduction="sum").item())
        gaps.append(abs(math.exp(max(logprobs)) - 0.5))
    return round(sum(gaps) / num, 4)


def _answer_length(encoded: Encoded) -> int:
    """Tokens of the last turn: earlier answers are not asked for."""
    length = 1
    while length < len(encoded.targets) and encoded.targets[-length - 1] == encoded.targets[-length] - 1:
        length += 1
    return length


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--finish", type=Path, nargs="+", help="trainings from the mean of whose weights to start")
    parser.add_argument("--steps", type=int, help=f"{WHOLE.num_steps} unless given; {FINISH.num_steps} of --finish")
    parser.add_argument("--rate", type=float, help=f"highest learning rate; {FINISH.peak:g} of --finish")
    parser.add_argument("--pairs", type=int, default=USUAL.pairs, help="of --finish, see mixture.Finish")
    parser.add_argument("--others", type=float, default=USUAL.others, help="of --finish, see mixture.Finish")
    parser.add_argument("--long-keys", type=float, default=USUAL.long_keys, help="of --finish, see mixture.Finish")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "pid").write_text(str(os.getpid()))
    schedule = FINISH if options.finish else WHOLE
    schedule = replace(schedule, num_steps=options.steps or schedule.num_steps, peak=options.rate or schedule.peak)
    finish = Finish(options.pairs, options.others, options.long_keys)
    training = Training(options.folder, schedule, options.seed, finish)
    if options.finish:
        training.start_from(*options.finish)
    training.run()


if __name__ == "__main__":
    main()
