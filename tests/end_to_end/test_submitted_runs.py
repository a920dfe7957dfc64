"""Whole runs on a real head that demands a token, driven by the commands alone: submit, follow, cut, stop, go on.

Input and output are on an object store whose key the cluster has and the submitting machine hasn't; that key and Ray's
token are the canaries, and are looked for wherever a run leaves a trace.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import yaml

from tests.driver_processes import REPOSITORY, wait_until
from tests.ray_head import Head, Proxy, all_text_below, ray_head
from tests.whole_runs import check_whole, num_started, read_output, spec_text, write_prompts

pytestmark = pytest.mark.long  # some 3 minutes on 2 cores; tests/jobs/test_ray_jobs.py is its sample

KEY_ID, SECRET = "AKIACANARY00000000", "canary-51c0ffee"
ROWS = 1000


class Machine:
    """A machine with the cluster's token, and without any credentials of the object store."""

    def __init__(self, head: Head, folder: Path) -> None:
        self._head = head
        self.folder = folder
        self.said: list[str] = []
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self, *words: str, address: str | None = None, module: str = "tests.scripted_submitted"
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", module, *(["tramontane"] if module.startswith("tests") else [])]
        kept = {name: value for name, value in self._head.environment().items() if not name.startswith("AWS_")}
        number = len(self._started)
        process = subprocess.Popen(
            [*command, *words, "--address", address or self._head.address],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": str(REPOSITORY)},
            stdout=(self.folder / f"{number}.out").open("w"),
            stderr=(self.folder / f"{number}.err").open("w"),
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def output(self, process: subprocess.Popen[str], kind: str = "out") -> str:
        return (self.folder / f"{self._started.index(process)}.{kind}").read_text()

    def run(self, *words: str, address: str | None = None) -> tuple[int, str, str]:
        process = self.start(*words, address=address)
        code = process.wait(200)
        return code, self.output(process), self.output(process, "err")

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal")


@pytest.fixture(scope="module")
def head(journal: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    engines = tmp_path_factory.mktemp("engines") / "engines.json"
    engines.write_text(json.dumps({"moe": [4, 8, 2], "step_delay_s": 0.2, "max_num_seqs": 4, "journal": str(journal)}))
    with ray_head({"SCRIPTED_ENGINES": str(engines), "TEAM_KEY": KEY_ID, "TEAM_SECRET": SECRET}) as started:
        yield started


@pytest.fixture
def machine(head: Head, tmp_path: Path) -> Iterator[Machine]:
    found = Machine(head, tmp_path)
    yield found
    found.close()


def storage_words(url: str) -> list[str]:
    values = {
        "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "${env:TEAM_KEY}",
        "AWS_SECRET_ACCESS_KEY": "${env:TEAM_SECRET}",
    }
    return [word for name, value in values.items() for word in ("--env", f"{name}={value}")]


def put_rows(folder: Path, bucket: str, num_rows: int, **columns: list[Any]) -> str:
    url = f"s3://{bucket}/in-{num_rows}.parquet"
    fsspec.filesystem("s3", skip_instance_cache=True).put(
        str(write_prompts(folder / "in.parquet", num_rows, **columns)), url
    )
    return url


def committed(output: str) -> int:
    store = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    with contextlib.suppress(FileNotFoundError):
        return len(store.ls(f"{output}/data", detail=False))
    return 0


def raw_listing(head: Head) -> str:
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request) as answer:
        return str(answer.read().decode())


@pytest.mark.timeout(400)
def test_submit_follow_cut_follow_stop_resubmit_done(
    head: Head, machine: Machine, journal: Path, s3_server: str, s3_bucket: str, tmp_path: Path
) -> None:
    output = f"s3://{s3_bucket}/out"
    rows = put_rows(tmp_path, s3_bucket, ROWS, text=[None, *[f"question {n}" for n in range(ROWS - 1)]])
    (tmp_path / "job.yaml").write_text(spec_text(rows, output))
    words = ["submit", "job.yaml", *storage_words(s3_server)]

    # Submit, and follow over a connection that is cut.
    code, listed, said = machine.run(*words, "--detach", "--json")
    assert code == 0, said
    job_id = json.loads(listed)["id"]
    proxy = Proxy(head.port)
    follower = machine.start("logs", job_id, "-f", address=proxy.address)
    wait_until(lambda: f"run {job_id}: {ROWS:,} rows" in machine.output(follower), "the run's log arrives")
    proxy.cut()
    wait_until(lambda: f"is cut; {job_id} goes on" in machine.output(follower, "err"), "the cut is noticed")
    proxy.mend()
    wait_until(lambda: "answers again" in machine.output(follower, "err"), "the connection is back")

    # The same run again is refused, while another machine may watch and go.
    code, _, said = machine.run(*words)
    assert code == 2
    assert f"{job_id} is running, and has the same output" in said
    watcher = machine.start("logs", "job.yaml", "-f")
    wait_until(lambda: f"run {job_id}" in machine.output(watcher), "the watcher sees the log")
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait(60) == 130
    assert f"detached; {job_id} goes on" in machine.output(watcher, "err")

    # Stop: shards that are begun are committed, and the follower ends as the run did.
    wait_until(lambda: committed(output) >= 2, "some parts are committed")
    code, _, said = machine.run("stop", "job.yaml")
    assert (code, f"{job_id} stopped (exit 130)" in said) == (0, True), said
    assert follower.wait(60) == 130
    _, whole_log, _ = machine.run("logs", job_id)
    assert machine.output(follower) == whole_log
    assert whole_log.count("interrupted: finishing what is begun") == 1
    assert whole_log.count("what is committed is safe") == 1
    code, status, _ = machine.run("status", job_id, "--json")
    assert (json.loads(status)["state"], json.loads(status)["exit_code"]) == ("stopped", 130)
    before = committed(output)
    assert before >= 2
    assert num_started(journal) < ROWS

    # Submitted again, it goes on where it stopped.
    code, listed, said = machine.run(*words, "--json")
    assert code == 0, said
    assert json.loads(listed)["id"] == f"{job_id}.2"
    assert f"run {job_id}.2 resumes {output}" in said
    assert "code from" in said
    assert "working_dir_files" in said.split("code from ")[1].splitlines()[0]
    check_whole(output, ROWS)
    assert num_started(journal) <= ROWS + 64  # rows of shards that were cut off are done again
    _, table, _ = machine.run("list")
    assert [line.split()[:3] for line in table.splitlines()[1:]][-2:] == [
        [job_id, "stopped", "130"],
        [f"{job_id}.2", "succeeded", "0"],
    ]
    proxy.close()
    look_for_canaries(head, machine, output)


def look_for_canaries(head: Head, machine: Machine, output: str) -> None:
    """In logs, job listing, manifests, summary, error rows: in every byte that the runs left."""
    for canary in (SECRET, KEY_ID, head.token):
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        objects = {path: store.cat_file(path) for path in store.find(output)}
        assert any(path.endswith("summary.json") for path in objects)
        assert [path for path, data in objects.items() if canary.encode() in data] == []
        texts = [*all_text_below(machine.folder), *all_text_below(head.folder)]
        assert len(texts) > 20
        assert [path for path, text in texts if canary.encode() in text and path != head.token_file] == []
        assert canary not in raw_listing(head)
        assert canary not in str(read_output(output).to_pylist())


@pytest.mark.timeout(400)
def test_each_exit_code_comes_back(
    head: Head, machine: Machine, s3_server: str, s3_bucket: str, tmp_path: Path
) -> None:
    rows = put_rows(tmp_path, s3_bucket, 64, text=[None] * 64)
    (tmp_path / "job.yaml").write_text(spec_text(rows, f"s3://{s3_bucket}/out"))
    storage = storage_words(s3_server)

    # 2: refused on the cluster, before anything is spent.
    code, _, said = machine.run("submit", "job.yaml", *storage, "--set", f"input.path=s3://{s3_bucket}/nowhere.parquet")
    assert code == 2
    assert "matches no file" in said
    assert "the run would fail, so it wasn't started" in said
    code, _, said = machine.run("submit", "job.yaml", *storage, "--env", "HF_TOKEN=${env:NO_SUCH_VARIABLE}")
    assert code == 2
    assert "HF_TOKEN is to come from NO_SUCH_VARIABLE, which" in said

    fleet = "fleet.pools=[{gpu: H100-80G, tensor_parallel: 2, replicas: 1}]"
    code, _, said = machine.run("submit", "job.yaml", *storage, "--set", fleet)
    assert code == 2
    assert "H100-80G" in said
    assert "the run would fail, so it wasn't started" in said

    # 1: done, with more failed rows than allowed.
    code, _, said = machine.run("submit", "job.yaml", *storage, "--no-check")
    assert code == 1, said
    assert "more rows failed than limits.max_failed_fraction allows" in said

    # 3: its driver is lost.
    many = put_rows(tmp_path, s3_bucket, ROWS)
    long = ["--set", f"input.path={many}", "--set", f"output.path=s3://{s3_bucket}/long"]
    follower = machine.start("submit", "job.yaml", *storage, "--no-check", *long)
    wait_until(lambda: f": {ROWS:,} rows in" in machine.output(follower, "err"), "the run works")
    for pid in drivers_of(head):
        os.kill(pid, signal.SIGKILL)
    assert follower.wait(100) == 3
    assert "submit it again: it goes on where it stopped" in machine.output(follower, "err")


@pytest.mark.timeout(400)
def test_a_synthesis_has_its_later_steps_done_too(
    machine: Machine, s3_server: str, s3_bucket: str, tmp_path: Path
) -> None:
    output = f"s3://{s3_bucket}/talks"
    rows = put_rows(tmp_path, s3_bucket, 12)
    spec = yaml.safe_load(spec_text(rows, output, prompt={"template": "{{ tone }}: {{ text }}"}))
    talk = {"turns": 2, "user": "What do you say next?\n\n{{ conversation }}"}
    spec |= {"kind": "synthesize", "synthesize": {"samplers": {"tone": {"category": ["calm"]}}, "conversation": talk}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    code, _, said = machine.run("submit", "job.yaml", *storage_words(s3_server))
    assert code == 0, said
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    found = {name: [row for path in store.find(f"{output}/{name}") for row in read_part(store, path)] for name in KINDS}
    assert len(found["records"]) + len(found["dropped"]) == 12
    assert found["records"]
    for record in found["records"]:
        assert [message["role"] for message in json.loads(record["record"])] == ["user", "assistant"] * 2
    report = json.loads(store.cat_file(f"{output}/synthesis.json"))["synthesis"]
    turns = [step["step"] for step in report["steps"] if step["step"].startswith("/turns/")]
    assert [step.split("-")[1] for step in turns] == ["user", "assistant"]


KINDS = ("records", "dropped")


def read_part(store: Any, path: str) -> list[dict[str, Any]]:
    with store.open(path) as file:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def drivers_of(head: Head) -> list[int]:
    """Python processes that run a submitted job on this head: in a folder of its."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if b"tests.scripted_submitted" in words and os.readlink(f"/proc/{name}/cwd").startswith(str(head.folder)):
                found.append(int(name))
    return found
