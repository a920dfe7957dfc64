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
from jobs.synthesis_answers import Answer, Key, answers_to_questions, read_answers, shards_by_file
from jobs.synthesis_rounds import RoundEnded, RunStep, questions_spec
from pipeline.inputs import InputFile
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
_SAID = {"user": "User", "assistant": "Assistant"}

Talk = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class HalfTurn:
    """One side's messages of a turn: what was asked, and the run that answered."""

    turn: int
    role: str
    store: Store
    """Of the synthesis."""
    folder: str = ""
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
        if (file := _file_of(part_name)) in self.parts:
            for line in self.store.read(f"{self.folder}/questions/{file}").splitlines():
                yield json.loads(line)

    def answers_of(self, part_name: str) -> dict[Key, Answer]:
        """What was answered to them."""
        return answers_to_questions(self.answers, self.parts.get(_file_of(part_name), ()))


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
        chats = dict(zip(table.column(ROW).to_pylist(), stage.chats(table, folded=False), strict=True))
        return {
            answer.key: (*chat, Message("assistant", answer.text or ""))
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
        begun = [replace(self, halves=self.halves[:end]) for end in range(0, len(self.halves) + 1, 2)]
        talks = [talk.of_part(shard, answers, stage) for talk in begun]
        ends = [(half, half.answers_of(shard.part_name)) for half in self.halves]
        return [(row, self._told(answer, [found.get(answer.key) for found in talks], ends)) for row, answer in answers]

    def _told(
        self,
        answer: Answer,
        begun: Sequence[Talk | None],
        ends: Sequence[tuple[HalfTurn, Mapping[Key, Answer]]],
    ) -> Answer:
        """`begun` is the talk after each of its turns, as far as it came."""
        so_far = max((talk for talk in begun if talk is not None), key=len, default=())
        if so_far:
            words = "\n".join(message.content for message in so_far[-(2 * begun.index(so_far) + 1) :])
            answer = replace(answer, text=json.dumps(_as_turns(so_far), ensure_ascii=False), words=words)
        if begun[-1] is not None:
            return answer
        if begun[0] is None and _is_word(answer):
            return replace(answer, status="failed", problem="turn 1: its prompt can't be made again")
        for where, found in (("turn 1", answer), *((half.name, said.get(answer.key)) for half, said in ends)):
            if found is None:
                return replace(answer, status="failed", problem=f"{where}: it couldn't be asked for")
            if found.status != "ok":
                return replace(answer, status=found.status, problem=f"{where}: {found.problem}")
            if not _is_word(found):
                return replace(answer, status="invalid", problem=f"{where}: it is empty")
        return replace(answer, status="failed", problem="its turns can't be put together again")


def converse(talks: Talks, run: RunStep) -> Talks:
    """Do all turns after the first.

    Raises:
        RoundEnded: a run ended early; the same command goes on with it.
    """
    settings = _settings(talks.job)
    for turn in range(2, 1 + (settings.turns if settings is not None else 1)):
        for role in ("user", "assistant"):
            talks = replace(talks, halves=(*talks.halves, _half_turn(talks, HalfTurn(turn, role, talks.store), run)))
    return talks


def read_talks(talks: Talks) -> Iterator[tuple[Shard, pa.Table, list[tuple[int, Answer]]]]:
    """As `read_answers`, but of a synthesis of conversations the text of an answer is the whole talk, as JSON."""
    answered = read_answers(talks.store, talks.later)
    if talks.job.spec.synthesize is None or talks.job.spec.synthesize.conversation is None:
        yield from answered
        return
    with contextlib.closing(_talk_stage(talks.job)) as stage:
        for shard, part, answers in answered:
            yield shard, part, talks.told(shard, answers, stage)


def _settings(job: PreparedJob) -> ConversationSettings | None:
    return job.spec.synthesize.conversation if job.spec.synthesize is not None else None


def _talk_stage(job: PreparedJob) -> TemplateStage:
    """Makes the job's prompts without its examples, which are shown each time and belong to no talk."""
    return TemplateStage(replace(job.template, prompt=job.template.prompt.model_copy(update={"examples": []})))


def _half_turn(talks: Talks, half: HalfTurn, run: RunStep) -> HalfTurn:
    half = _written(talks, half)
    if not half.folder:
        return half
    spec, root = talks.job.spec, talks.store.root.rstrip("/")
    examples = spec.prompt.examples if half.role == "assistant" else ()
    questions = f"{root}/{half.folder}/questions"
    summary = run(prepare(questions_spec(spec, questions, half.answers.root, examples=examples)))
    if summary["exit_code"] != 0:
        raise RoundEnded(summary)
    return replace(half, parts=shards_by_file(half.answers))


def _written(talks: Talks, half: HalfTurn) -> HalfTurn:
    """Write a line for each talk that goes on, part by part, into a folder that is named after all of them; the half
    turn with that folder, or without one where no talk goes on.

    Twice over the answers, for the name has to be known first; files that are there are left: their time would count as
    a change.
    """
    digest, any_line = hashlib.sha256(), False
    with contextlib.closing(_Asker(talks, half)) as asker:
        for part_name, lines in asker.questions():
            digest.update(f"{part_name}\n{lines}".encode())
            any_line = True
        if not any_line:
            return half
        half = replace(half, folder=f"{FOLDER}/{half.turn}-{half.role}-{digest.hexdigest()[:12]}")
        there = set(talks.store.list(f"{half.folder}/questions"))
        for part_name, lines in asker.questions():
            if _file_of(part_name) not in there:
                talks.store.put(f"{half.folder}/questions/{_file_of(part_name)}", lines.encode())
    return half


class _Asker:
    """Makes the questions of one half turn."""

    def __init__(self, talks: Talks, half: HalfTurn) -> None:
        job, settings = talks.job, _settings(talks.job)
        self._job, self._talks, self._half = job, talks, half
        self._seed = job_seed(talks.store, job.spec.sampling.seed)
        self._first = _talk_stage(job)
        self._user: TemplateStage | None = None
        if half.role == "user" and settings is not None:
            prompt = PromptSettings(template=settings.user, marker_text=job.spec.prompt.marker_text)
            self._user = TemplateStage(replace(job.template, prompt=prompt))

    def close(self) -> None:
        self._first.close()
        if self._user is not None:
            self._user.close()

    def questions(self) -> Iterator[tuple[str, str]]:
        """Of each part with talks that go on its name, and their questions, one a line."""
        for shard, _, answers in read_answers(self._talks.store, self._talks.later):
            if lines := self._lines(shard, answers):
                yield shard.part_name, "".join(lines)

    def _lines(self, shard: Shard, answers: Sequence[tuple[int, Answer]]) -> list[str]:
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
        each = each.drop_columns([TALK] if TALK in each.column_names else [])
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
    """As the simulated user sees it: what the assistant was told beforehand isn't for it."""
    said = [message for message in talk if message.role in _SAID]
    return "\n\n".join(f"{_SAID[message.role]}: {message.content}" for message in said)
