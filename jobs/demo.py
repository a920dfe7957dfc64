"""The demonstration: makes 200 chat prompts, runs the main job on them, and shows what came out."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import SpecError

SUBJECTS = [
    "the mistral wind",
    "a lighthouse",
    "sourdough bread",
    "the number seven",
    "glaciers",
    "a night train",
    "bees",
]
TASKS = {
    "poetry": "Write two lines of verse about {}.",
    "facts": "List three facts about {}.",
    "code": "Write a Python function that prints a line about {}.",
    "translation": "How would you say a sentence about {} in French?",
}
SPEC = """\
# Written by `tramontane demo`. Copy it, edit the copy and run that, or start afresh with `tramontane init`.
name: demo
model:    {{source: tiny, dtype: float32, max_model_len: 1024}}
input:    {{path: "{prompts}"}}
prompt:   {{messages: messages}}
sampling: {{temperature: 0.7, max_tokens: 48, seed: 3}}
output:   {{path: "{output}"}}
routing:  {{level: counts, slice_by: topic}}
"""


def make_prompts(num_rows: int) -> list[dict[str, Any]]:
    """Chats of one to three turns, with and without a system message; always the same for the same number."""
    rng = random.Random(8)
    rows = []
    for number in range(num_rows):
        topic = rng.choice(sorted(TASKS))
        subject = rng.choice(SUBJECTS)
        messages = [{"role": "user", "content": TASKS[topic].format(subject)}]
        if rng.random() < 0.3:
            messages.insert(0, {"role": "system", "content": "Answer in one short paragraph."})
        if rng.random() < 0.3:
            messages += [
                {"role": "assistant", "content": f"Gladly. What should I know about {subject}?"},
                {"role": "user", "content": f"Keep it simple; this is request {number}."},
            ]
        rows.append({"id": f"demo-{number:04d}", "topic": topic, "messages": messages})
    return rows


def run_demo(folder: Path, *, rows: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Write prompts and spec under `folder` and run the job; returns the summary.

    Raises:
        SpecError: `folder` holds a demonstration that was edited, or one of another size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jobs.prepare import prepare
    from jobs.report import closing_lines
    from jobs.run import RunOptions, run_job
    from jobs.spec import load_spec

    began = datetime.now(UTC)
    folder.mkdir(parents=True, exist_ok=True)
    prompts, spec_file = folder / "prompts.parquet", folder / "job.yaml"
    text = SPEC.format(prompts=prompts, output=folder / "result")
    if not spec_file.exists():
        spec_file.write_text(text)
    elif spec_file.read_text() != text:
        raise SpecError(
            f"{spec_file} was edited; run it with `tramontane run {spec_file}`, or give the demo another --output"
        )
    table = pa.Table.from_pylist(make_prompts(rows))
    if not prompts.exists():
        pq.write_table(table, prompts)
    elif not pq.read_table(prompts).equals(table):  # its modification time is part of the run: never written again
        raise SpecError(f"{prompts} doesn't hold the demo's {rows} prompts; give --rows as before, or another --output")
    say(f"{rows} chat prompts in {prompts}, job in {spec_file}")
    job = prepare(load_spec(spec_file))
    summary = run_job(job, RunOptions(), say=say)
    for line in closing_lines(job, summary, spec_words=[str(spec_file)], began=began):
        say(line)
    return summary


def demo_tables(folder: Path) -> list[str]:
    """A few rows of a finished demonstration, and how its experts were used."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    output = folder / "result"
    table = pq.read_table(output / "data").sort_by("input_row").slice(0, 4)
    lines = ["", "id         status     in  out  text (noise: the weights are random, and so never stop by themselves)"]
    for row in table.select(["id", "status", "num_input_tokens", "num_generated_tokens", "generated_text"]).to_pylist():
        text = " ".join((row["generated_text"] or "").split())[:60]
        lines.append(
            f"{row['id']:<10} {row['status']:<9} {row['num_input_tokens']:>3} {row['num_generated_tokens']:>4}  {text}"
        )
    experts = pq.read_table(output / "routing" / "experts.parquet")
    lines += ["", "share of selections per expert, all rows", "layer  " + " ".join(f"{e:>5}" for e in range(8))]
    for layer in sorted(set(experts.column("layer").to_pylist())):
        rows = experts.filter(pc.equal(experts.column("layer"), layer)).to_pylist()
        total = sum(row["selections"] for row in rows) or 1
        shares = [sum(r["selections"] for r in rows if r["expert"] == e) / total for e in range(8)]
        lines.append(f"{layer:>5}  " + " ".join(f"{share:5.1%}" for share in shares))
    return lines
