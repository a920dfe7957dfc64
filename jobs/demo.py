"""The demonstration: makes 200 chat prompts, runs the main job on them, and shows what came out."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.demo_prompts import make_prompts
from pipeline.errors import SpecError

SPEC = """\
# Written by `tramontane demo`. Copy it, edit the copy and run that, or start afresh with `tramontane init`.
name: demo
model:    {{source: tiny, dtype: float32, max_model_len: 1024}}
input:    {{path: "{prompts}"}}
prompt:   {{messages: messages}}
sampling: {{temperature: 0, max_tokens: 64}}
output:   {{path: "{output}"}}
routing:  {{level: counts, slice_by: kind}}
"""


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
    """A row of each kind, how many answers are right, and how the experts were used."""
    import pyarrow.parquet as pq

    output = folder / "result"
    rows = pq.read_table(output / "data").sort_by("input_row").to_pylist()
    lines = ["", "id         in  out  question -> answer"]
    for row in rows[:5]:
        question = " ".join(row["messages"][-1]["content"].split())
        shown = question if len(question) <= 60 else f"{question[:28]} ... {question[-27:]}"
        answer = (row["generated_text"] or "").strip()
        lines.append(
            f"{row['id']:<9} {row['num_input_tokens']:>3} {row['num_generated_tokens']:>4}  {shown} -> {answer}"
        )
    right = sum((row["generated_text"] or "").strip() == row["expected"] for row in rows)
    lines += ["", f"{right} of {len(rows)} answers are the expected ones", *_expert_table(output)]
    return lines


def _expert_table(output: Path) -> list[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    experts = pq.read_table(output / "routing" / "experts.parquet")
    lines = ["", "share of selections per expert, all rows", "layer  " + " ".join(f"{e:>5}" for e in range(8))]
    for layer in sorted(set(experts.column("layer").to_pylist())):
        rows = experts.filter(pc.equal(experts.column("layer"), layer)).to_pylist()
        total = sum(row["selections"] for row in rows) or 1
        shares = [sum(r["selections"] for r in rows if r["expert"] == e) / total for e in range(8)]
        lines.append(f"{layer:>5}  " + " ".join(f"{share:5.1%}" for share in shares))
    return lines
