"""The jobs API of a real head that demands a token: states, exit codes, logs over a connection that is cut, secrets.

The jobs here are shell commands; tests/end_to_end/test_submitted_runs.py does whole runs.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.follow import follow
from jobs.ray_jobs import JobsApi, UnknownJob, _client_class
from jobs.submission import SubmittedJob, environment
from pipeline.errors import InfrastructureError, SpecError
from tests.driver_processes import wait_until
from tests.ray_head import Head, Proxy, all_text_below, free_port, ray_head

CANARY = "canary-7f3a91"
PROGRAM = Path(sys.executable).parent / "tramontane"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head({"TEAM_SECRET": CANARY}, num_cpus=4) as started:
        yield started


class JobsWithToken(JobsApi):
    """Ray reads its token once per process, and this one may have another Ray's; the commands below read their own."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self._client = _client_class()(address, headers={"Authorization": f"Bearer {token}"})


@pytest.fixture
def jobs(head: Head) -> JobsApi:
    return JobsWithToken(head.address, head.token)


def ended(jobs: JobsApi, job_id: str) -> SubmittedJob:
    wait_until(lambda: not jobs.job(job_id).is_live, f"{job_id} ends", deadline_s=60)
    return jobs.job(job_id)


@pytest.mark.timeout(200)
def test_jobs_of_a_real_head(head: Head, jobs: JobsApi, tmp_path: Path) -> None:
    """One test, for one start of Ray (8 s)."""
    (tmp_path / "empty").mkdir()
    variables, _ = environment(["SECRET=${env:TEAM_SECRET}", "MISSING_KEY=${env:NOWHERE}"], drain_timeout_s=1)

    def start(job_id: str, command: str) -> None:
        jobs.submit(job_id, command, folder=str(tmp_path / "empty"), variables=variables, metadata={})

    # Each state has its exit code; the secret is there and isn't shown.
    start("fails", "exit 1")
    start("broken", "kill -9 $$")
    start("told", 'test -n "$SECRET" && test -z "$MISSING_KEY" && exit 2')
    start(
        "lives",
        'trap "echo ending; exit 0" TERM; for i in 1 2 3 4 5 6 7 8 9; do echo é $i; sleep 0.2; done; sleep 99 & wait',
    )
    assert [ended(jobs, job_id).exit_code for job_id in ("fails", "broken", "told")] == [1, 3, 2]
    with pytest.raises(SpecError, match="was submitted by somebody else meanwhile"):
        start("fails", "exit 0")
    with pytest.raises(UnknownJob, match="has no job nobody"):
        jobs.job("nobody")

    # A log that is followed while its connection is cut twice.
    proxy = Proxy(head.port)
    written: list[str] = []
    said: list[str] = []
    found: list[SubmittedJob] = []
    follower = threading.Thread(
        target=lambda: found.append(
            follow(JobsWithToken(proxy.address, head.token), "lives", write=written.append, say=said.append)
        )
    )
    follower.start()
    for number in (1, 2):
        wait_until(lambda: "é 2" in "".join(written), "the log arrives", deadline_s=60)
        proxy.cut()
        wait_until(lambda number=number: len(said) == 2 * number - 1, "the cut is noticed", deadline_s=60)
        proxy.mend()
        wait_until(lambda number=number: len(said) == 2 * number, "the connection is back", deadline_s=60)
    assert jobs.stop("lives")
    follower.join(60)
    proxy.close()
    assert (found[0].state, found[0].exit_code) == ("stopped", 130)
    assert "".join(written) == jobs.logs("lives")
    assert jobs.logs("lives").count("é 9\n") == 1
    assert jobs.logs("lives").rstrip().endswith("ending")
    assert not jobs.stop("lives")

    # From a process of its own: whoever has no token is told so, and whoever has sees the list.
    def listed(**changes: str) -> subprocess.CompletedProcess[str]:
        command = [PROGRAM, "list", "--all", "--address", head.address]
        environment = {**head.environment(), **changes}
        return subprocess.run(command, check=False, env=environment, capture_output=True, text=True)

    (tmp_path / "wrong").write_text("0" * 64)
    refused = listed(RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "asks for Ray's token, and this machine has none or another one" in refused.stderr
    table = listed().stdout
    assert {tuple(line.split()[:3]) for line in table.splitlines()[1:]} == {
        ("fails", "failed", "1"),
        ("broken", "failed", "3"),
        ("told", "failed", "2"),
        ("lives", "stopped", "130"),
    }
    spilled = [path for path, text in all_text_below(head.folder) if CANARY.encode() in text]
    assert spilled == []
    assert CANARY not in table + str(jobs._client.list_jobs())
    assert not any(head.token.encode() in text for path, text in all_text_below(head.folder) if path != head.token_file)


def test_an_address_where_nothing_answers_is_exit_3() -> None:
    with pytest.raises(InfrastructureError, match=r"nothing answers at http://127\.0\.0\.1"):
        JobsApi(f"http://127.0.0.1:{free_port()}")


def test_the_address_given_is_the_one_asked_whatever_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    given = f"http://127.0.0.1:{free_port()}"
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InfrastructureError) as found:
        JobsApi(given)
    assert given in str(found.value.__cause__)


def test_a_server_that_is_no_ray_is_exit_3(s3_server: str) -> None:
    with pytest.raises(InfrastructureError, match="answered"):
        JobsApi(s3_server)
