"""A few rows through the real path, to look at before spending on all of them.

Same reading, templating, dispatch, engine and parts as a run, in a scratch directory that is removed; the job's own
output isn't touched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.parquet as pq

from jobs.engines import kept_engines
from jobs.estimate import even_sample
from jobs.execute import execute_work
from jobs.interrupts import Interrupts
from jobs.prepare import PreparedJob
from jobs.run import engines_of
from jobs.summary import Execution
from jobs.work import Work
from pipeline.counters import RowTotals
from pipeline.errors import SpecError
from pipeline.read import read_shard
from pipeline.rows import FILE, PROMPT_IDS, ROW
from pipeline.storage import Store
from pipeline.templating import TemplateStage

SHOWN_CHARS = 600


def run_preview(
    job: PreparedJob, *, num_rows: int, say: Callable[[str], None], ray: str | None = None
) -> dict[str, Any]:
    """Answer up to `num_rows` rows, spread evenly over the input, and return what came out.

    Raises:
        SpecError: the input has no rows.
        KeyboardInterrupt: it was interrupted; there may be nothing to show.
    """
    if job.plan.num_rows == 0:
        raise SpecError(f"input.path {job.spec.input.path!r} has no rows; there is nothing to preview")
    rows = pick_rows(job, num_rows)
    work = Work(shards=(), rows=rows)
    execution = Execution(run_id="preview")
    say(f"preview of {work.num_single_rows} rows of {job.plan.num_rows:,}; the engine loads first")
    with tempfile.TemporaryDirectory(prefix="tramontane-preview-") as folder:
        interrupts = Interrupts()
        with kept_engines() as engines, interrupts.heard():
            engines.find(engines_of(job, address=ray), interrupts, say=say)
            status, exit_code = execute_work(
                job.tolerating_failures(),
                work,
                Store(folder),
                execution,
                RowTotals(),
                engines,
                interrupts,
                quiet=True,
            )
        if status == "interrupted":
            raise KeyboardInterrupt
        table = pq.read_table(f"{folder}/data")
    samples: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for sample in table.sort_by("sample_index").to_pylist():
        samples.setdefault((sample["input_file"], sample["input_row"]), []).append(sample)
    return {
        "rows": [_row(prompt, samples) for prompt in _prompts(job, rows)],
        "rates": execution.rates(),
        "timings": {name: round(seconds, 3) for name, seconds in execution.timings.items()},
        "exit_code": exit_code,
    }


def pick_rows(job: PreparedJob, num_rows: int) -> dict[int, list[int]]:
    """Rows spread evenly over the input: shard index -> row numbers within the file."""
    picked: dict[int, list[int]] = {}
    for number in even_sample(job.plan.num_rows, num_rows):
        shard, row = job.plan.find(number)
        picked.setdefault(shard.index, []).append(row)
    return picked


def preview_lines(report: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines: list[str] = []
    for row in report["rows"]:
        lines.append(f"--- {row['input_file']} row {row['input_row']}")
        lines.append(f"prompt ({row['num_input_tokens']} tokens): {_cut(row['prompt'])}")
        if row["repairs"]:
            lines.append(f"repairs: {', '.join(row['repairs'])}")
        for sample in row["samples"]:
            error = sample["error"]
            outcome = _cut(sample["generated_text"] or "") if error is None else f"{error['kind']}: {error['message']}"
            lines.append(f"{sample['status']} ({sample['num_generated_tokens'] or 0} tokens): {outcome}")
    rates = report["rates"]
    if rates:
        lines.append(
            f"measured: {rates['rows_per_s']:,.1f} rows/s, {rates['output_tokens_per_s']:,.0f} output tokens/s"
        )
    return lines


def _prompts(job: PreparedJob, rows: dict[int, list[int]]) -> Iterator[dict[str, Any]]:
    """What templating makes of the rows, once more, to show it."""
    stage = TemplateStage(job.template)
    try:
        for index, keep in sorted(rows.items()):
            shard = job.plan.shard(index)
            table = stage(read_shard(job.plan.files[shard.file_index], shard, job.read_schema, keep=keep))
            for row in table.select([FILE, ROW, PROMPT_IDS]).to_pylist():
                ids = row[PROMPT_IDS] or []
                yield {
                    "input_file": row[FILE],
                    "input_row": row[ROW],
                    "num_input_tokens": len(ids),
                    "prompt": stage.decode(ids) if ids else "",
                }
    finally:
        stage.close()


def _row(prompt: dict[str, Any], samples: dict[tuple[str, int], list[dict[str, Any]]]) -> dict[str, Any]:
    mine = samples[prompt["input_file"], prompt["input_row"]]
    shown = ("status", "generated_text", "num_generated_tokens", "finish_reason", "error")
    return {
        **prompt,
        "repairs": mine[0]["prompt_repairs"] or [],
        "samples": [{name: sample[name] for name in shown} for sample in mine],
    }


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[:SHOWN_CHARS]}..."
