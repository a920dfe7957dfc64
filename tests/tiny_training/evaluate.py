"""Measures the tiny model through the pipeline itself: real vLLM on CPU, Parquet in, Parquet out.

`python -m tests.tiny_training.evaluate --model MODEL --folder out/tiny-eval` writes `report.json`, `report.md` and
`expert_use.svg`; 500 rows of each task take some minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.fleet import start_fleet, stop_fleet
from cluster.pools import PoolPlan
from jobs.run import RunOptions, run_job
from pipeline.model import fetch_model
from pipeline.routing_measures import jensen_shannon_distance
from pipeline.settings import ModelSettings
from pipeline.vllm_engine import VllmEngineConfig
from tests.own_ray import own_ray
from tests.tiny_training.evaluation import (
    Answered,
    accuracy,
    calibration,
    evaluation_rows,
    passkey_tenths,
    safe_rows,
)
from tests.tiny_training.picture import heat_map
from tests.whole_runs import make_job, read_output

MAX_MODEL_LEN = 4096
MAX_TOKENS = 64
NO_WILDCARDS = str.maketrans("[] ", "---")
# Mixtral's template, `<s> [INST] question [/INST]`, spoilt as people spoil it: what begins a chat, and a user's turn.
# None is recognised as Mixtral's own, so the pipeline uses each as it is.
WRONG_TEMPLATES = {
    "double BOS": ("{{- bos_token + bos_token }}", "{{- ' [INST] ' + text + ' [/INST]' }}"),
    "no spaces inside": ("{{- bos_token }}", "{{- ' [INST]' + text + '[/INST]' }}"),
    "[INST] doubled": ("{{- bos_token }}", "{{- ' [INST] [INST] ' + text + ' [/INST] [/INST]' }}"),
    "no [INST] at all": ("{{- bos_token }}", "{{- ' ' + text }}"),
}


class Measuring:
    """Runs on one live engine."""

    def __init__(self, model: Path, folder: Path, fleet: Any, dtype: str) -> None:
        self.model, self.folder, self.dtype, self._fleet = model, folder, dtype, fleet
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self, name: str, rows: Sequence[dict[str, Any]], *, model: Path | None = None, **prompt: Any
    ) -> list[Answered]:
        """Answer the rows greedily; `model` is where the template comes from, `prompt` more of the spec's section."""
        questions = self.folder / f"{name.translate(NO_WILDCARDS)}.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows)), questions)
        job = make_job(
            questions,
            self.output(name),
            model={"source": str(model or self.model), "dtype": self.dtype, "max_model_len": MAX_MODEL_LEN},
            prompt={"messages": "messages", **prompt},
            sampling={"temperature": 0, "max_tokens": MAX_TOKENS, "logprob": True},
            routing={"slice_by": "slice"},
            output={"resume": "never"},
        )
        summary = run_job(job, RunOptions(quiet=True), say=lambda line: None, fleet=self._fleet)
        if summary["exit_code"] or summary["counts"]["failed"]:
            raise RuntimeError(f"the run {name} ended with {summary['exit_code']}: {summary['counts']}")
        return [
            Answered(row, row["generated_text"], row["cumulative_logprob"])
            for row in read_output(self.output(name)).to_pylist()
        ]

    def output(self, name: str) -> Path:
        """Where a run's results are."""
        return self.folder / f"{name.translate(NO_WILDCARDS)}-out"

    def with_wrong_template(self, name: str) -> Path:
        """Return a copy of the model with a spoilt chat template."""
        target = self.folder / f"model {name.translate(NO_WILDCARDS)}"
        shutil.copytree(self.model, target)
        begin, turn = WRONG_TEMPLATES[name]
        template = (
            f"{begin}{{%- for message in messages %}}{{%- set text = message['content'] %}}"
            f"{{%- if message['role'] == 'user' %}}{turn}{{%- else %}}{{{{- ' ' + text + eos_token }}}}{{%- endif %}}"
            "{%- endfor %}"
        )
        (target / "chat_template.jinja").write_text(template)
        return target


@contextmanager
def measuring(model: Path, folder: Path, *, dtype: str = "float32", num_threads: int = 2) -> Iterator[Measuring]:
    """An engine for the model, for the duration of the block; Ray must be there."""
    files = fetch_model(ModelSettings(source=str(model)))
    engine = VllmEngineConfig(
        model_path=files.path,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        moe=files.moe,
        on_cpu=True,
        num_threads=num_threads,
    )
    fleet = start_fleet([PoolPlan("tiny", 1, engine, env=engine.environment())])
    try:
        yield Measuring(model, folder, fleet, dtype)
    finally:
        stop_fleet(fleet)


def measure(here: Measuring, num_rows: int) -> dict[str, Any]:
    """Everything that the model card says, of `num_rows` rows a task."""
    answers = here.run("all", evaluation_rows(num_rows))
    under_safe = here.run("safe", safe_rows(num_rows), safe_prompt=True)
    ambiguous = {
        kind: [answer for answer in answers if answer.row["task"] == f"{kind}_ambiguous"]
        for kind in ("sentiment", "topic")
    }
    return {
        "rows_per_task": num_rows,
        "dtype": here.dtype,
        "accuracy": {**accuracy(answers), **accuracy(under_safe)},
        "passkey_by_depth": passkey_tenths(answers, "depth"),
        "passkey_by_length": passkey_tenths(answers, "length"),
        "calibration": {kind: asdict(calibration(own)) for kind, own in ambiguous.items()},
        "routing": routing_figures(here.output("all")),
        "wrong_templates": wrong_template_costs(here, max(10, num_rows // 5)),
        "wrong": [
            {"slice": a.row["slice"], "asked": a.row["messages"][-1]["content"][-80:], "got": a.text.strip()}
            | {"wanted": a.row["answer"]}
            for a in (*answers, *under_safe)
            if not a.is_right and not a.row["task"].endswith("_ambiguous")
        ][:60],
    }


def routing_figures(output: Path) -> dict[str, Any]:
    """Entropy and dead experts per layer over all tokens, and the distance of each two slices, mean over layers."""
    layers = pq.read_table(output / "routing" / "layers.parquet").to_pylist()
    whole = [row for row in layers if row["slice"] == "(all)" and row["phase"] == "all"]
    shares = shares_of_slices(output)
    names = sorted(shares)
    distances = [[jensen_shannon_distance(shares[a], shares[b]) for b in names] for a in names]
    alike = np.mean(list(shares.values()), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(alike > 0, alike * np.log(alike), 0.0)
    return {
        "entropy": [row["entropy"] for row in whole],
        "dead_experts": [row["dead_experts"] for row in whole],
        "entropy_slices_alike": (-terms.sum(axis=1) / np.log(alike.shape[1])).tolist(),
        "slices": names,
        "distances": [[float(layers.mean()) for layers in line] for line in distances],
        "distances_per_layer": {
            f"{names[i]} | {names[j]}": distances[i][j].tolist() for i in range(len(names)) for j in range(i)
        },
    }


def shares_of_slices(output: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Each slice's share of selections per layer and expert, prompt and completion together; [layers, experts]."""
    counts: dict[str, np.ndarray[Any, Any]] = {}
    for row in pq.read_table(output / "routing" / "experts.parquet").to_pylist():
        table = counts.setdefault(row["slice"], np.zeros((4, 8)))
        table[row["layer"], row["expert"]] += row["selections"]
    return {name: table / table.sum(axis=1, keepdims=True) for name, table in counts.items()}


def wrong_template_costs(here: Measuring, num_rows: int) -> dict[str, dict[str, float]]:
    """Accuracy by task under Mixtral's template and under each spoilt one, on rows of at most 1,000 tokens."""
    rows = [row for row in evaluation_rows(num_rows, seed=2) if (row["length"] or 0) <= 1000]
    found = {"Mixtral's own": accuracy(here.run("right template", rows), by="task")}
    for name in WRONG_TEMPLATES:
        model = here.with_wrong_template(name)
        found[name] = accuracy(here.run(name, rows, model=model, marker_text="allow"), by="task")
    return found


def as_markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    lines = ["| slice | right |", "|---|---|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in report["accuracy"].items()]
    lines += ["", "| passkey, tenth of | " + " | ".join(str(n) for n in range(1, 11)) + " |", "|---" * 11 + "|"]
    for what in ("depth", "length"):
        lines.append(f"| {what} | " + " | ".join(f"{share:.1%}" for share in report[f"passkey_by_{what}"]) + " |")
    lines += ["", "| ambiguous | expected calibration error | mean gap |", "|---|---|---|"]
    for kind, found in report["calibration"].items():
        lines.append(f"| {kind} | {found['expected_error']:.3f} | {found['mean_gap']:.3f} |")
    tasks = sorted(report["wrong_templates"]["Mixtral's own"])
    lines += ["", "| template | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name, found in report["wrong_templates"].items():
        lines.append(f"| {name} | " + " | ".join(f"{found[task]:.1%}" for task in tasks) + " |")
    routing = report["routing"]
    lines += ["", "| layer | entropy | entropy, slices alike | dead experts |", "|---|---|---|---|"]
    for layer, figures in enumerate(
        zip(routing["entropy"], routing["entropy_slices_alike"], routing["dead_experts"], strict=True)
    ):
        lines.append(f"| {layer} | {figures[0]:.3f} | {figures[1]:.3f} | {figures[2]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory with weights, config and tokenizer")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with own_ray(), measuring(options.model, options.folder, dtype=options.dtype, num_threads=options.threads) as here:
        report = measure(here, options.rows)
    (options.folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    (options.folder / "report.md").write_text(as_markdown(report))
    routing = report["routing"]
    title = "Jensen-Shannon distance of expert use, mean of 4 layers"
    (options.folder / "expert_use.svg").write_text(heat_map(routing["slices"], routing["distances"], title=title))
    print(as_markdown(report))


if __name__ == "__main__":
    main()
