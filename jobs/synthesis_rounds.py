"""Asks again for records that came out invalid or cut: each round is an ordinary run over a file that it makes first.

Invariant: a round's folder is named after the very questions in it, so that a round that was killed goes on where it
stopped, and one whose questions have changed begins anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.execute import job_seed
from jobs.job_spec import JobSpec
from jobs.prepare import PreparedJob, prepare
from jobs.synthesis_answers import BROKEN, Answer, Key, answers_of_round, read_answers
from pipeline.ledger import Ledger
from pipeline.prompts import Message
from pipeline.read import read_shard
from pipeline.record_fields import SOURCE
from pipeline.rows import ROW, SAMPLING
from pipeline.sampling import row_seed
from pipeline.settings import Example, InputSettings, PromptSettings
from pipeline.storage import Store
from pipeline.templating import TemplateStage

FOLDER = "retries"
MAX_SHOWN_CHARS = 4000
"""Of a wrong answer that the model is shown again."""
_PER_JOB = ("n", "column", "fit", "dedupe")

RunStep = Callable[[PreparedJob], dict[str, Any]]


class RoundEnded(Exception):
    """A round was interrupted; carries its summary."""

    def __init__(self, summary: dict[str, Any]) -> None:
        super().__init__(summary)
        self.summary = summary


def ask_again(job: PreparedJob, store: Store, run: RunStep) -> tuple[dict[Key, Answer], list[dict[str, Any]]]:
    """Do all rounds; returns the answers that replace earlier ones, and a report of each round.

    Raises:
        RoundEnded: a round ended early; the same command goes on with it.
    """
    later: dict[Key, Answer] = {}
    report: list[dict[str, Any]] = []
    for number in range(1, 1 + (job.spec.synthesize.retries if job.spec.synthesize is not None else 0)):
        questions = _questions(job, store, later, number)
        if not questions:
            break
        name = f"{FOLDER}/{number}-{hashlib.sha256(questions).hexdigest()[:12]}"
        if f"{name.partition('/')[2]}.jsonl" not in store.list(FOLDER):
            store.put(f"{name}.jsonl", questions)  # left as it is when it is there: its time counts as a change
        root = store.root.rstrip("/")
        step = prepare(questions_spec(job.spec, f"{root}/{name}.jsonl", f"{root}/{name}"))
        summary = run(step)
        if summary["exit_code"] != 0:
            raise RoundEnded(summary)
        answers = answers_of_round(Store(f"{root}/{name}"), number)
        mended = sum(answer.status == "ok" for answer in answers.values())
        later |= answers
        report.append({"asked_again": questions.count(b"\n"), "mended": mended, "output": f"{root}/{name}"})
    return later, report


def _questions(job: PreparedJob, store: Store, later: Mapping[Key, Answer], number: int) -> bytes:
    """One line of JSON for each broken record, in the order of the plan."""
    seed = job_seed(store, job.spec.sampling.seed)
    files = Ledger(store).plan.files
    lines: list[str] = []
    stage = TemplateStage(job.template)
    try:
        for shard, _, answers in read_answers(store, later):
            broken = [answer for _, answer in answers if answer.status in BROKEN]
            if not broken:
                continue
            rows = sorted({answer.key[1] for answer in broken})
            table = read_shard(files[shard.file_index], shard, job.read_schema, keep=rows)
            chats = dict(zip(table.column(ROW).to_pylist(), stage.chats(table), strict=True))
            sampling = dict(zip(rows, stage(table).column(SAMPLING).to_pylist(), strict=True))
            for answer in broken:
                row_seeds = row_seed(seed, f"{answer.key[0].removeprefix(job.input_root)}\0{number}", answer.key[1])
                override = _override(job.spec, sampling[answer.key[1]], row_seeds + answer.key[2])
                lines.append(_question(answer, chats[answer.key[1]], override))
    finally:
        stage.close()
    return "".join(lines).encode()


def _question(answer: Answer, chat: tuple[Message, ...] | None, override: dict[str, Any]) -> str:
    turns = [(message.role, message.content) for message in chat or ()]
    shown = (answer.text or "")[:MAX_SHOWN_CHARS]
    # A chat goes user, assistant, user; an empty answer can't be a turn of it.
    turns += [("assistant", shown)] if shown.strip() else []
    how = "shorter" if answer.status == "truncated" else "without that mistake"
    turns.append(("user", f"That answer can't be used: {answer.problem}. Answer again, {how}."))
    line = {
        "messages": json.dumps([{"role": role, "content": content} for role, content in turns]),
        "sampling": json.dumps(override),
        **dict(zip(SOURCE, answer.key, strict=True)),
    }
    return json.dumps(line) + "\n"


def _override(spec: JobSpec, resolved: str | None, seed: int) -> dict[str, Any]:
    """What a row's sampling says other than the job's, and a seed of its own: another round, other chances."""
    base = json.loads(spec.sampling.model_dump_json())
    own = json.loads(resolved) if resolved is not None else {}
    return {name: value for name, value in own.items() if name not in _PER_JOB and value != base[name]} | {"seed": seed}


def questions_spec(spec: JobSpec, questions: str, output: str, *, examples: Sequence[Example] = ()) -> JobSpec:
    """A run with the job's model and sampling over chats that a step of a synthesis has written."""
    sampling = spec.sampling.model_copy(update={"n": 1, "column": "sampling"})
    return spec.model_copy(
        update={
            "kind": "complete",
            "synthesize": None,
            "input": InputSettings(path=questions),
            "prompt": PromptSettings(messages="messages", marker_text=spec.prompt.marker_text, examples=list(examples)),
            "sampling": sampling,
            "output": spec.output.model_copy(update={"path": output, "keep": list(SOURCE), "resume": "if_possible"}),
            "limits": spec.limits.model_copy(update={"max_failed_fraction": 1.0}),
            "routing": spec.routing.model_copy(update={"slice_by": None}),
        }
    )
