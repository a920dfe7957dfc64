"""A second look at records: a labelling run over those that are left, whose labels are scores by a rubric.

The run is an ordinary one, on the same engines, in a folder named after what it is asked; one that was killed goes on
where it stopped. Invariant: whatever it answers, a record ends with a score or with the reason why it has none.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.job_spec import JobSpec
from jobs.prepare import PreparedJob, prepare
from jobs.spec_label import as_template
from jobs.synthesis_answers import Key, shards_by_file
from jobs.synthesis_rounds import RoundEnded, RunStep
from pipeline.labels import LABEL
from pipeline.parts import read_part
from pipeline.record_fields import SOURCE
from pipeline.settings import InputSettings, LabelSettings, PromptSettings, RoutingSettings, SamplingSettings
from pipeline.shards import Shard
from pipeline.storage import Store
from pipeline.synthesis_settings import JudgeSettings

FOLDER = "judge"
_ASK = "{instructions}\n\nRecord:\n{{{{ record }}}}\n\nScores:\n{scores}\n\nAnswer with the score alone."


@dataclass(frozen=True, slots=True)
class Judged:
    """What the judge said of a record."""

    score: int | None
    problem: str | None = None
    """Why there is no score."""


NOT_ASKED = Judged(None, "it wasn't asked about")


@dataclass(frozen=True, slots=True)
class Judgement:
    """All that the judge said, read part by part."""

    store: Store
    parts: Mapping[str, list[Shard]] = field(default_factory=dict)
    """Of each file of records that was judged, what holds its scores."""

    def of_part(self, part_name: str) -> dict[Key, Judged]:
        """The scores of the records in that file."""
        found: dict[Key, Judged] = {}
        for shard in self.parts.get(part_name, ()):
            part = read_part(self.store, shard.part_name)
            columns = (part.column(name).to_pylist() for name in (*SOURCE, LABEL, "error"))
            for file, row, sample, label, error in zip(*columns, strict=True):
                problem = None if error is None else f"{error['kind']}: {error['message']}"
                found[file, row, sample] = Judged(None if label is None else int(label), problem)
        return found


def judge(job: PreparedJob, candidates: Callable[[], Iterator[tuple[str, pa.Table]]], run: RunStep) -> Judgement | None:
    """Have all candidates judged; None without a judge.

    Args:
        job: the synthesis.
        candidates: goes through the records to be judged, part by part; called twice, as the name has to come first.
        run: does a run.

    Raises:
        RoundEnded: the run ended early; the same command goes on with it.
    """
    store = Store(job.spec.output.path)
    settings = job.spec.synthesize.judge if job.spec.synthesize is not None else None
    if settings is None:
        return None
    folder = f"{FOLDER}/{_name(settings, candidates())}"
    root = f"{store.root.rstrip('/')}/{folder}"
    there, is_any = set(store.list(f"{folder}/records")), False
    for part_name, table in candidates():
        is_any = True
        if part_name not in there:  # left as it is when it is there: its time counts as a change
            store.put(f"{folder}/records/{part_name}", encoded(table))
    output = Store(f"{root}/scores")
    if not is_any:
        return Judgement(output)
    summary = run(prepare(_judge_spec(job.spec, settings, f"{root}/records", output.root)))
    if summary["exit_code"] != 0:
        raise RoundEnded(summary)
    return Judgement(output, shards_by_file(output))


def encoded(table: pa.Table) -> bytes:
    """As a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _name(settings: JudgeSettings, candidates: Iterator[tuple[str, pa.Table]]) -> str:
    digest = hashlib.sha256(judge_prompt(settings).encode())
    for part_name, table in candidates:
        digest.update(json.dumps([part_name, table.select([*SOURCE, "record"]).to_pydict()]).encode())
    return digest.hexdigest()[:12]


def judge_prompt(settings: JudgeSettings) -> str:
    """The question about a record, as a template over its columns."""
    scores = as_template("\n".join(f"- {score}: {meaning}" for score, meaning in settings.scores.items()))
    return _ASK.format(instructions=settings.instructions.strip(), scores=scores)


def _judge_spec(spec: JobSpec, settings: JudgeSettings, records: str, output: str) -> JobSpec:
    return spec.model_copy(
        update={
            "kind": "label",
            "synthesize": None,
            "label": LabelSettings(text="record", choices=[str(score) for score in settings.scores]),
            "input": InputSettings(path=records),
            "prompt": PromptSettings(template=judge_prompt(settings), marker_text=spec.prompt.marker_text),
            "sampling": SamplingSettings(temperature=0.0, max_tokens=1),
            "output": spec.output.model_copy(update={"path": output, "keep": list(SOURCE), "resume": "if_possible"}),
            "limits": spec.limits.model_copy(update={"max_failed_fraction": 1.0}),
            "routing": RoutingSettings(level=spec.routing.level),
        }
    )
