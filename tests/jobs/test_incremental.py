"""Night after night without engines: which rows are claimed, done, given back and done again, and what is refused.

Runs are stood in for by `FakeRuns`, which reads a run's shards as the real one does and commits their rows as they are,
so that hundreds of nights fit into seconds; tests/end_to_end/test_incremental.py has whole ones.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import jobs.incremental
import jobs.new_rows
from jobs.chain import latest_run, put_object, read_chain
from jobs.chain_status import describe_runs, run_lines
from jobs.cli import app
from jobs.incremental import Command, run_incremental
from jobs.preflight import preflight
from jobs.prepare import PreparedJob
from jobs.run import RunOptions
from jobs.run_diff import last_two
from jobs.spec import parse_spec
from pipeline.errors import InfrastructureError, SpecError
from pipeline.parts import committed_parts
from pipeline.read import read_shard
from pipeline.storage import Store
from tests.incremental_jobs import Nightly, claims, write_rows
from tests.whole_runs import make_job, snapshot, spec_text


class Killed(BaseException):
    """As sudden as SIGKILL, seen from here."""


class FakeRuns:
    """Stands in for `run_job`: commits each shard's rows, and may be killed after some of them."""

    def __init__(self) -> None:
        self.kill_after: int | None = None

    def __call__(self, job: PreparedJob, options: RunOptions, *, say: Any, **_: Any) -> dict[str, Any]:
        store, done = Store(job.spec.output.path), 0
        for shard in job.plan:
            if shard.part_name in committed_parts(store):
                continue
            if self.kill_after is not None and done == self.kill_after:
                self.kill_after = None
                raise Killed
            rows = read_shard(job.plan.files[shard.file_index], shard, job.read_schema)
            assert rows.num_rows == shard.num_rows
            sink = io.BytesIO()
            pq.write_table(rows.select(["id", "text"]), sink)
            store.put(f"data/{shard.part_name}", sink.getvalue())
            done += 1
        counts = {"missing_rows": 0, "failed": 0, "committed_rows": job.plan.num_rows}
        summary = {"status": "done", "exit_code": 0, "counts": counts}
        store.put("summary.json", json.dumps(summary).encode())
        return summary


class Nights(Nightly):
    """A job whose runs are fake, over rows {id: text} in files of its own."""

    def __init__(self, folder: Path, **source: Any) -> None:
        super().__init__(folder / "in" / "**" / "*.parquet", folder / "out", **source)
        self.folder = folder / "in"

    def write(self, name: str, rows: dict[int, str]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"id": [str(number) for number in rows], "text": list(rows.values())})
        pq.write_table(table, path)

    def night(self, *, accept_changes: bool = False, **sections: Any) -> int:
        """Rows that tonight's command did."""
        spec = parse_spec(self.spec_text(**sections), name="test.yaml")
        options = RunOptions(quiet=True, accept_changes=accept_changes)
        report = run_incremental(Command(spec, options, self.said.append))
        assert report["exit_code"] == 0
        return sum(run["summary"]["counts"]["committed_rows"] for run in report["runs"])

    def parts(self) -> list[Path]:
        return sorted(Path(self.output).glob("runs/*/data/*.parquet"), key=lambda path: (path.parts[-3], path.name))

    def as_one_table(self) -> dict[int, str]:
        """All runs as one table, as the README has it."""
        found = duckdb.sql(
            f"SELECT * FROM read_parquet('{self.output}/runs/*/data/*.parquet', filename = true, union_by_name = true) "
            "QUALIFY row_number() OVER (PARTITION BY id ORDER BY filename DESC) = 1"
        ).fetchall()
        return {int(row[0]): row[1] for row in found}

    def answers(self) -> list[tuple[int, str]]:
        """All committed (id, text), oldest run first."""
        found: list[tuple[int, str]] = []
        for part in self.parts():
            table = pq.read_table(part)
            found += zip(map(int, table["id"].to_pylist()), table["text"].to_pylist(), strict=True)
        return found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(jobs.incremental, "run_job", fake)
    return fake


def texts(numbers: range, version: str = "a") -> dict[int, str]:
    return {number: f"{version} {number}" for number in numbers}


BY_ID = {"id": "id", "new_by": "id"}


class World:
    """Files of rows that come, and come again, over random nights; ids are never in two files of one night."""

    def __init__(self, job: Nights, seed: int) -> None:
        self.job, self.dice = job, random.Random(seed)
        self.files: dict[str, dict[int, str]] = {}
        self.waiting: dict[str, dict[int, str]] = {}
        """Files that no command has seen as they are."""
        self.first: dict[int, str] = {}
        self.latest: dict[int, str] = {}
        self._num_ids = 0

    def arrive(self, night: int) -> None:
        """A new file or a new version of one, with new rows and known ones, some of them changed."""
        is_new = self.dice.random() < 0.6 or not self.files
        name = f"{self.dice.randrange(10**6)}.parquet" if is_new else self.dice.choice([*self.files])
        rows = dict(self.files.get(name, {}))
        count = self.dice.randrange(1, 150)
        rows |= texts(range(self._num_ids, self._num_ids + count), f"night {night}:")
        self._num_ids += count
        known = self.dice.sample([*self.latest], min(len(self.latest), 20))
        rows |= {number: self.dice.choice([self.latest[number], f"changed {night}"]) for number in known}
        if all(rows.keys().isdisjoint(others) for other, others in self.waiting.items() if other != name):
            self.write(name, rows)

    def write(self, name: str, rows: dict[int, str]) -> None:
        self.files[name] = self.waiting[name] = rows
        self.job.write(name, rows)

    def seen(self) -> None:
        """A command begins."""
        for rows in self.waiting.values():
            self.first = rows | self.first
            self.latest |= rows
        self.waiting.clear()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("changed", ["ignore", "redo"])
def test_random_nights_do_every_row_once_and_every_change_once(
    tmp_path: Path, runs: FakeRuns, changed: str, seed: int
) -> None:
    """Files come late, are rewritten, repeat others' rows; nights are missed, repeated, killed."""
    job = Nights(tmp_path, **BY_ID, changed=changed)
    world, chance = World(job, seed), random.Random(seed + 100)
    for night in range(16):
        for _ in range(1 if night == 0 else chance.randrange(3)):
            world.arrive(night)
        if chance.random() < 0.2:
            continue  # missed
        world.seen()
        if chance.random() < 0.5:
            runs.kill_after = chance.randrange(3)
            try:
                job.night()
            except Killed:
                if chance.random() < 0.5:  # and before anybody comes back, the input is rewritten
                    name = chance.choice([*world.files])
                    world.write(name, dict(reversed(world.files[name].items())))
                    world.seen()
            runs.kill_after = None
        job.night()
        assert job.night() == 0
        answers: dict[int, list[str]] = {}
        for number, text in job.answers():
            answers.setdefault(number, []).append(text)
        if changed == "ignore":
            assert answers == {number: [text] for number, text in world.first.items()}
        else:
            assert {number: given[-1] for number, given in answers.items()} == world.latest
            assert job.as_one_table() == world.latest
            assert all(a != b for given in answers.values() for a, b in itertools.pairwise(given))


def test_whole_files_are_known_by_path_and_a_changed_one_is_done_again_when_asked(
    tmp_path: Path, runs: FakeRuns
) -> None:
    job = Nights(tmp_path)
    job.write("a.parquet", texts(range(10)))
    job.write("b.parquet", texts(range(10, 15)))
    assert [job.night(), job.night()] == [15, 0]
    job.write("b.parquet", texts(range(10, 20), "b"))
    job.write("0/c.parquet", texts(range(20, 24)))
    job.write("0/empty.parquet", {})
    assert job.night() == 4
    left = f"note: 1 files changed since they were done and are left as they are: {job.folder}/b.parquet"
    assert any(left in line for line in job.said)
    assert job.night() == 0
    job.source["changed"] = "redo"
    assert [job.night(), job.night()] == [10, 0]
    assert read_chain(Store(job.output)).links[-1].claim.changed_rows == 10
    assert Counter(number for number, _ in job.answers()) == {n: 2 if 10 <= n < 15 else 1 for n in range(24)}


def test_by_content_equal_rows_are_one_row_and_a_new_empty_column_changes_none(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, new_by="content")
    job.write("a.parquet", texts(range(10)))
    pq.write_table(pa.table({"id": ["1", "1", "99"], "text": ["a 1", "new", "new"]}), job.folder / "b.parquet")
    pq.write_table(pa.concat_tables([pq.read_table(job.folder / "a.parquet")] * 2), job.folder / "c.parquet")
    assert [job.night(), job.night()] == [12, 0]
    old = pq.read_table(job.folder / "a.parquet").to_pydict()
    pq.write_table(pa.table({**old, "more": pa.nulls(10, pa.string())}), job.folder / "d.parquet")
    assert job.night() == 0
    pq.write_table(pa.table({**old, "more": ["x"] * 10}), job.folder / "e.parquet")
    assert job.night() == 10


def test_days_are_taken_once_over_and_late_files_of_a_day_when_asked(
    tmp_path: Path, runs: FakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 11, 20, 16, tzinfo=UTC).astimezone(tz)

    monkeypatch.setattr(jobs.new_rows, "datetime", Clock)
    job = Nights(tmp_path, new_by="partition", partition="date")
    for day in (18, 19, 20):
        job.write(f"date=2026-11-{day}/a.parquet", texts(range(day, day + 1)))
    assert job.night() == 2
    assert "note: 2026-11-20 isn't over in UTC: 1 files wait for a later run" in job.said
    job.source["timezone"] = "Asia/Tokyo"  # where it is 1 o'clock on the 21st
    assert [job.night(), job.night()] == [1, 0]
    job.write("date=2026-11-19/late.parquet", texts(range(100, 103)))
    assert job.night() == 0
    assert "note: 1 days changed since they were done and are left as they are: 2026-11-19" in job.said[-2]
    job.source["changed"] = "redo"
    assert [job.night(), job.night()] == [4, 0]
    job.write("elsewhere.parquet", texts(range(1)))
    with pytest.raises(SpecError, match=r"no folder is date=YYYY-MM-DD in .*elsewhere\.parquet"):
        job.night()


@pytest.mark.parametrize("source", [{}, {"new_by": "partition", "partition": "date"}], ids=["file", "partition"])
def test_files_that_a_run_gave_back_are_new_and_those_it_had_done_are_not(
    tmp_path: Path, runs: FakeRuns, source: dict[str, Any]
) -> None:
    job = Nights(tmp_path, **source)
    for name in "abc":
        job.write(f"date=2026-11-18/{name}.parquet", texts(range(100 * ord(name), 100 * ord(name) + 10)))
    runs.kill_after = 1
    with pytest.raises(Killed):
        job.night()
    job.write("date=2026-11-18/b.parquet", texts(range(10)))
    assert [job.night(), job.night()] == [20, 0]
    assert "run 1 (runs/000001-" in job.said[1]
    assert f"ends with 10 rows, and gives 20 back: {job.folder}/date=2026-11-18/b.parquet isn't the file" in job.said[1]
    assert claims(job.output) == ["000001.json", "000001.released.json", "000002.json"]
    assert set(Counter(number for number, _ in job.answers()).values()) == {1}
    assert latest_run(job.output).rpartition("/")[2].startswith("000002-")


def test_changed_settings_are_refused_by_name_and_go_on_when_accepted(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, **BY_ID)
    job.write("a.parquet", texts(range(10)))
    job.night()
    job.write("b.parquet", texts(range(10, 12)))
    other = {"sampling": {"max_tokens": 7}}
    before = snapshot(tmp_path / "out")
    with pytest.raises(
        SpecError, match=r"aren't those of run 1 in .*\n  sampling\.max_tokens: 6 -> 7\nUndo the change"
    ):
        job.night(**other)
    assert snapshot(tmp_path / "out") == before
    assert job.night(limits={"max_failed_fraction": 0.5}, accept_changes=True, **other) == 2
    assert read_chain(Store(job.output)).links[-1].claim.accepted_changes == ("sampling.max_tokens: 6 -> 7",)
    assert job.night(**other) == 0


def test_a_run_cut_short_under_other_settings_is_refused_or_gives_the_rest_back(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, **BY_ID)
    job.write("a.parquet", texts(range(100)))
    other = {"sampling": {"max_tokens": 7}}
    for kill_after in (0, 1):
        runs.kill_after = kill_after
        with pytest.raises(Killed):
            job.night()
        if kill_after == 0:
            continue
        with pytest.raises(SpecError, match=r"isn't finished, and these settings changed since it began:\n  sampling"):
            job.night(**other)
    assert job.night(accept_changes=True, **other) == 36
    assert Counter(number for number, _ in job.answers()) == dict.fromkeys(range(100), 1)
    job.write("b.parquet", texts(range(100, 110)))
    runs.kill_after = 0
    with pytest.raises(Killed):
        job.night(**other)
    third = {"sampling": {"max_tokens": 8}}
    with pytest.raises(
        SpecError, match=r"sampling\.max_tokens: 7 -> 8"
    ):  # what committed nothing gives way, no further
        job.night(**third)
    assert job.night(**other) == 10


def test_telling_rows_apart_otherwise_is_refused(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, **BY_ID, changed="redo")
    job.write("a.parquet", texts(range(10)))
    job.night()
    for source in ({"new_by": "content", "changed": "ignore"}, {"id": "text"}, {"new_by": "file", "changed": "ignore"}):
        other = Nights(tmp_path, **{**BY_ID, "changed": "redo", **source})
        with pytest.raises(SpecError, match=r"run 1 \(runs/.*\) told new rows from known ones in another way \("):
            other.night()
    with pytest.raises(SpecError, match=r"columns: \['text'\] -> \['id', 'text'\]"):
        job.night(prompt={"template": "{{ text }} {{ id }}"}, accept_changes=True)
    job.source["changed"] = "ignore"
    assert job.night(prompt={"template": "{{ text }} {{ id }}"}, accept_changes=True) == 0


def test_an_output_is_a_run_or_the_runs_of_a_job_never_both(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, **BY_ID)
    job.write("a.parquet", texts(range(10)))
    job.night()
    plain = make_job(job.folder / "a.parquet", job.output)
    with pytest.raises(SpecError, match=r"holds the runs of a job with input\.new: since_last_run"):
        preflight(plain, RunOptions(), Store(job.output))
    (tmp_path / "plain" / "_run").mkdir(parents=True)
    (tmp_path / "plain" / "_run" / "fingerprint.json").write_text('{"fields": {}}')
    job.output = str(tmp_path / "plain")
    with pytest.raises(SpecError, match=r"holds a run of its own, without input\.new: since_last_run"):
        job.night()


def test_two_claims_are_never_made_from_the_same_chain(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, **BY_ID)
    job.write("a.parquet", texts(range(10)))
    job.night()
    chain = read_chain(Store(job.output))
    (link,) = chain.links
    for number in ("first", "second"):
        claim = replace(link.claim, run=2, previous=link.sha256, claimed_at=number)
        if number == "first":
            chain.create(claim)
            continue
        with pytest.raises(InfrastructureError, match=r"000002\.json was created by another run at this moment"):
            chain.create(claim)


@pytest.mark.parametrize("damage", ["changed", "missing", "keys"])
def test_a_chain_that_is_not_whole_is_refused(tmp_path: Path, runs: FakeRuns, damage: str) -> None:
    job = Nights(tmp_path, **BY_ID)
    for number in range(3):
        job.write(f"{number}.parquet", texts(range(10 * number, 10 * number + 10)))
        job.night()
    chain = read_chain(Store(job.output))
    second = tmp_path / "out" / "_chain" / "000002.json"
    if damage == "changed":
        second.write_text(second.read_text().replace('"rows": 10', '"rows": 9'))
    elif damage == "missing":
        second.unlink()
    else:
        assert chain.links[1].claim.keys is not None
        (tmp_path / "out" / chain.links[1].claim.keys.name).write_bytes(b"")
    job.write("9.parquet", texts(range(90, 91)))
    with pytest.raises(InfrastructureError, match=r"restore"):
        job.night()


def test_what_was_stored_for_a_claim_that_was_never_made_is_swept(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, **BY_ID)
    job.write("a.parquet", texts(range(10)))
    job.night()
    orphan = put_object(Store(job.output), "plan.json", b"{}")
    job.write("b.parquet", texts(range(10, 20)))
    job.night()
    objects = Store(job.output).list("_chain/objects")
    assert orphan.name.rpartition("/")[2] not in objects
    assert len(objects) == 4


def test_status_names_the_runs_and_shows_the_latest(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, **BY_ID)
    for number in range(12):
        job.write(f"{number}.parquet", texts(range(10 * number, 10 * number + 10)))
        job.night()
    chain = read_chain(Store(job.output))
    described = describe_runs(chain)
    assert [each["run"] for each in described] == list(range(3, 13))
    lines = run_lines(len(chain.links), described)
    assert lines[0] == "... and 2 earlier runs"
    assert lines[-1] == f"  {chain.links[-1].claim.folder}  10 rows: done, 0 failed"


@pytest.mark.long  # a claim that is made once on S3 is tests/pipeline/test_storage.py's
def test_on_s3_a_night_cut_short_is_finished_and_a_claim_is_made_once(
    s3_bucket: str, tmp_path: Path, runs: FakeRuns
) -> None:
    store = Store(f"s3://{s3_bucket}")

    def arrive(name: str, numbers: range) -> None:
        store.put(f"in/{name}", write_rows(tmp_path / name, numbers).read_bytes())

    job = Nights(tmp_path, **BY_ID)
    job.source["path"] = job.input = f"s3://{s3_bucket}/in/*.parquet"
    job.output = f"s3://{s3_bucket}/out"
    arrive("a.parquet", range(70))
    runs.kill_after = 1
    with pytest.raises(Killed):
        job.night()
    arrive("0.parquet", range(60, 80))
    assert [job.night(), job.night()] == [70 + 10, 0]
    arrive("a.parquet", range(75))
    assert [job.night(), job.night()] == [0, 0]
    (first, second) = read_chain(Store(job.output)).links
    assert (first.claim.rows, second.claim.rows) == (70, 10)
    with pytest.raises(InfrastructureError, match="created by another run"):
        read_chain(Store(job.output)).create(replace(second.claim, claimed_at="later"))
    assert latest_run(job.output) == f"{job.output}/{second.claim.folder}"


def test_a_diff_of_one_job_is_of_its_last_two_finished_runs(tmp_path: Path, runs: FakeRuns) -> None:
    job = Nights(tmp_path, **BY_ID)
    for number in range(3):
        job.write(f"{number}.parquet", texts(range(100 * number, 100 * number + 70)))
        job.night()
        if number == 0:
            with pytest.raises(SpecError, match="has 1 finished runs"):
                last_two(job.output)
    folders = [f"{job.output}/{link.claim.folder}" for link in read_chain(Store(job.output)).links]
    assert last_two(job.output) == (folders[1], folders[2])
    runs.kill_after = 1
    job.write("3.parquet", texts(range(300, 370)))
    with pytest.raises(Killed):
        job.night()
    assert last_two(job.output) == (folders[1], folders[2])


def test_accepting_changes_is_for_incremental_jobs_alone(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(spec_text(tmp_path / "in.parquet", tmp_path / "out"))
    ended = CliRunner().invoke(app, ["run", str(tmp_path / "job.yaml"), "--accept-changes"])
    assert isinstance(ended.exception, SpecError)
    assert "--accept-changes is for jobs with input.new: since_last_run" in ended.exception.message
