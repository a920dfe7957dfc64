"""Goes on with a synthesis's answers as conversations: the model writes the user's next message, asked by a prompt for
that, then the assistant's answer to the talk so far, and so on by turns.

Each half of a turn is an ordinary run over a folder that it makes first, part by part, and names after what it follows
from; one that was killed goes on where it stopped. Invariant: a talk that breaks off has the reason, and where.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from jobs.execute import job_seed
from jobs.prepare import PreparedJob, prepare
from jobs.synthesis_answers import Answer, Key, answers_to_questions, read_answers
from jobs.synthesis_rounds import RoundEnded, RunStep, questions_spec
from pipeline.inputs import InputFile
from pipeline.ledger import Ledger
from pipeline.prompts import Message
from pipeline.read import read_shard
from pipeline.record_fields import SOURCE
from pipeline.rows import ROW
from pipeline.sampling import row_seed
from pipeline.settings import PromptSettings
from pipeline.shards import Shard
from pipeline.storage import Store
from pipeline.synthesis_settings import TALK, ConversationSettings
from pipeline.templating import TemplateStage

FOLDER = "turns"
_SAID = {"user": "User", "assistant": "Assistant", "system": "System"}

Talk = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class HalfTurn:
    """One side's messages of a turn: what was asked, and the run that answered."""

    turn: int
    role: str
    store: Store
    """Of the synthesis."""
    folder: str
    parts: Mapping[str, Sequence[Shard]] = field(default_factory=dict)
    """Of each file of questions, the shards with its answers."""

    @property
    def name(self) -> str:
        """For people."""
        return f"turn {self.turn}, {self.role}"

    @property
    def answers(self) -> Store:
        """Where the run's output is."""
        return Store(f"{self.store.root.rstrip('/')}/{self.folder}/answers")

    def questions_of(self, part_name: str) -> Iterator[dict[str, Any]]:
        """The questions that the samples of a part led to."""
        if part_name in self.parts:
            for line in self.store.read(f"{self.folder}/questions/{_file_of(part_name)}").splitlines():
                yield json.loads(line)

    def answers_of(self, part_name: str) -> dict[Key, Answer]:
        """What was answered to them."""
        return answers_to_questions(self.answers, self.parts.get(part_name, ()))


@dataclass(frozen=True, slots=True)
class Talks:
    """The first answers of a synthesis with the turns that followed so far."""

    job: PreparedJob
    store: Store
    later: Mapping[Key, Answer]
    files: Sequence[InputFile]
    """Of the synthesis's input."""
    halves: tuple[HalfTurn, ...] = ()

    def of_part(self, shard: Shard, answers: Sequence[tuple[int, Answer]], stage: TemplateStage) -> dict[Key, Talk]:
        """The talks that didn't break off, each with the assistant's last word."""
        if not self.halves:
            return self._first(shard, answers, stage)
        last = self.halves[-1]
        said = last.answers_of(shard.part_name)
        return {
            key: (*_read_talk(question["messages"]), Message("assistant", answer.text or ""))
            for question in last.questions_of(shard.part_name)
            if (answer := said.get(key := _key_of(question))) is not None and _is_word(answer)
        }

    def _first(self, shard: Shard, answers: Sequence[tuple[int, Answer]], stage: TemplateStage) -> dict[Key, Talk]:
        good = [answer for _, answer in answers if _is_word(answer)]
        if not good:
            return {}
        table = self.rows_of(shard, good)
        chats = dict(zip(table.column(ROW).to_pylist(), stage.chats(table), strict=True))
        shown = 2 * len(self.job.spec.prompt.examples)  # examples are ours, not the talk's
        return {
            answer.key: (*chat[shown:], Message("assistant", answer.text or ""))
            for answer in good
            if (chat := chats[answer.key[1]]) is not None
        }

    def rows_of(self, shard: Shard, answers: Sequence[Answer]) -> pa.Table:
        """The input rows that these answers are to, each once, in order."""
        rows = sorted({answer.key[1] for answer in answers})
        return read_shard(self.files[shard.file_index], shard, self.job.read_schema, keep=rows)

    def told(
        self, shard: Shard, answers: Sequence[tuple[int, Answer]], stage: TemplateStage
    ) -> list[tuple[int, Answer]]:
        """The answers of a part, each with its whole talk as its text, or where it broke off."""
        talks = self.of_part(shard, answers, stage)
        ends = [(half, half.answers_of(shard.part_name)) for half in self.halves]
        return [(row, self._told(answer, talks.get(answer.key), ends)) for row, answer in answers]

    @staticmethod
    def _told(answer: Answer, talk: Talk | None, ends: Sequence[tuple[HalfTurn, Mapping[Key, Answer]]]) -> Answer:
        if talk is not None:
            return replace(answer, text=json.dumps(_as_turns(talk), ensure_ascii=False))
        for where, found in (("turn 1", answer), *((half.name, said.get(answer.key)) for half, said in ends)):
            if found is None:
                return replace(answer, status="failed", problem=f"{where}: it couldn't be asked for")
            if found.status != "ok":
                return replace(answer, status=found.status, problem=f"{where}: {found.problem}")
            if not _is_word(found):
                return replace(answer, status="invalid", problem=f"{where}: it is empty")
        return replace(answer, status="failed", problem="turn 1: its prompt can't be made again")


def converse(job: PreparedJob, talks: Talks, name: str, run: RunStep) -> Talks:
    """Do all turns after the first; `name` changes with everything that they follow from.

    Raises:
        RoundEnded: a run ended early; the same command goes on with it.
    """
    settings = job.spec.synthesize.conversation if job.spec.synthesize is not None else None
    for turn in range(2, 1 + (settings.turns if settings is not None else 1)):
        for role in ("user", "assistant"):
            half = _half_turn(job, talks, HalfTurn(turn, role, talks.store, f"{FOLDER}/{name}/{turn}-{role}"), run)
            talks = replace(talks, halves=(*talks.halves, half))
    return talks


def read_talks(talks: Talks) -> Iterator[tuple[Shard, pa.Table, list[tuple[int, Answer]]]]:
    """As `read_answers`, but of a synthesis of conversations the text of an answer is the whole talk, as JSON."""
    answered = read_answers(talks.store, talks.later)
    if talks.job.spec.synthesize is None or talks.job.spec.synthesize.conversation is None:
        yield from answered
        return
    with contextlib.closing(TemplateStage(talks.job.template)) as stage:
        for shard, part, answers in answered:
            yield shard, part, talks.told(shard, answers, stage)


def conversation_name(said: bytes, settings: ConversationSettings) -> str:
    """Name of all turns that follow from `said`, the answers before; another number of turns keeps those there are."""
    return hashlib.sha256(said + settings.user.encode()).hexdigest()[:12]


def _half_turn(job: PreparedJob, talks: Talks, half: HalfTurn, run: RunStep) -> HalfTurn:
    if not _write_questions(job, talks, half):
        return half
    root = talks.store.root.rstrip("/")
    spec = questions_spec(job.spec, f"{root}/{half.folder}/questions", half.answers.root)
    summary = run(prepare(spec))
    if summary["exit_code"] != 0:
        raise RoundEnded(summary)
    plan = Ledger(half.answers).plan
    parts: dict[str, list[Shard]] = {}
    for shard in plan:
        file = plan.files[shard.file_index].path.rpartition("/")[2]
        parts.setdefault(file.removesuffix(".jsonl") + ".parquet", []).append(shard)
    return replace(half, parts=parts)


def _write_questions(job: PreparedJob, talks: Talks, half: HalfTurn) -> int:
    """Write a line for each talk that goes on, part by part; returns how many. Files that are there are left."""
    seed, there, total = job_seed(talks.store, job.spec.sampling.seed), talks.store.list(f"{half.folder}/questions"), 0
    with contextlib.closing(_Asker(job, talks, half, seed)) as asker:
        for shard, _, answers in read_answers(talks.store, talks.later):
            lines = asker.lines(shard, answers)
            total += len(lines)
            name = _file_of(shard.part_name)
            if lines and name not in there:
                talks.store.put(f"{half.folder}/questions/{name}", "".join(lines).encode())
    return total


class _Asker:
    """Makes the questions of one half turn."""

    def __init__(self, job: PreparedJob, talks: Talks, half: HalfTurn, seed: int) -> None:
        self._job, self._talks, self._half, self._seed = job, talks, half, seed
        self._first = TemplateStage(job.template)
        self._user: TemplateStage | None = None
        settings = job.spec.synthesize.conversation if job.spec.synthesize is not None else None
        if half.role == "user" and settings is not None:
            prompt = PromptSettings(template=settings.user, marker_text=job.spec.prompt.marker_text)
            self._user = TemplateStage(replace(job.template, prompt=prompt))

    def close(self) -> None:
        self._first.close()
        if self._user is not None:
            self._user.close()

    def lines(self, shard: Shard, answers: Sequence[tuple[int, Answer]]) -> list[str]:
        if self._user is not None:
            return self._for_the_user(shard, answers, self._user)
        asked = self._talks.halves[-1]
        before = replace(self._talks, halves=self._talks.halves[:-1]).of_part(shard, answers, self._first)
        said = asked.answers_of(shard.part_name)
        return [
            self._line(key, (*talk, Message("user", said[key].text or "")))
            for key, talk in before.items()
            if key in said and _is_word(said[key])
        ]

    def _for_the_user(self, shard: Shard, answers: Sequence[tuple[int, Answer]], stage: TemplateStage) -> list[str]:
        talks = self._talks.of_part(shard, answers, self._first)
        good = [answer for _, answer in answers if answer.key in talks]
        if not good:
            return []
        table = self._talks.rows_of(shard, good)
        places = {row: place for place, row in enumerate(table.column(ROW).to_pylist())}
        each = table.take(pa.array([places[answer.key[1]] for answer in good], pa.int64()))
        each = each.append_column(TALK, pa.array([_as_text(talks[answer.key]) for answer in good], pa.string()))
        chats = zip(good, stage.chats(each), strict=True)
        return [self._line(answer.key, chat) for answer, chat in chats if chat is not None]

    def _line(self, key: Key, chat: Talk) -> str:
        file, row, sample = key
        which = f"{file.removeprefix(self._job.input_root)}\0{self._half.name}"
        line = {
            "messages": json.dumps(_as_turns(chat)),
            "sampling": json.dumps({"seed": row_seed(self._seed, which, row) + sample}),
            **dict(zip(SOURCE, key, strict=True)),
        }
        return json.dumps(line) + "\n"


def _file_of(part_name: str) -> str:
    return part_name.removesuffix(".parquet") + ".jsonl"


def _is_word(answer: Answer) -> bool:
    return answer.status == "ok" and bool((answer.text or "").strip())


def _key_of(question: Mapping[str, Any]) -> Key:
    file, row, sample = (question[name] for name in SOURCE)
    return file, row, sample


def _read_talk(messages: str) -> Talk:
    return tuple(Message(each["role"], each["content"]) for each in json.loads(messages))


def _as_turns(talk: Talk) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in talk]


def _as_text(talk: Talk) -> str:
    return "\n\n".join(f"{_SAID[message.role]}: {message.content}" for message in talk)
