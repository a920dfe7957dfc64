"""A cluster's jobs API over HTTP, with Ray's token where Ray is told to use one, and errors that say what to do.

Knows jobs by their ids, nothing of what they do. Invariant: no call waits for ever.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from jobs.submission import SubmittedJob, submitted_job
from pipeline.errors import InfrastructureError, SpecError

AGENT_WAIT_S = 30.0
"""A head that has just come up refuses jobs until its agent is there, some seconds later."""
TIMEOUT_S = (5.0, 60.0)
"""To connect, and between two bytes of an answer."""
LOG_ERRORS = (OSError, RuntimeError)
"""What a broken log stream raises, `aiohttp.ClientError` besides."""
_OVERRULING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


class UnknownJob(SpecError):
    """The cluster has no job of that id."""


class JobsApi:
    """The jobs of one cluster.

    Raises, from every method:
        SpecError: the address is none, or the token isn't this cluster's.
        InfrastructureError: nothing answers, or not as it should.
    """

    def __init__(self, address: str) -> None:
        self.address = _checked(address)
        with self._translated():
            self._client = _client_class()(self.address)

    def ray_version(self) -> str:
        """Of the cluster's head."""
        with self._translated():
            answer = self._client._do_request("GET", "/api/version")
            return str(answer.json()["ray_version"])

    def submit(
        self,
        job_id: str,
        command: str,
        *,
        folder: str,
        variables: Mapping[str, str],
        metadata: Mapping[str, str],
        num_cpus: float = 0,
    ) -> None:
        """Upload the folder, which becomes the job's working directory, and start the job.

        With `num_cpus` it takes so many, on whichever node has them; else it runs on the head, and takes none.

        Raises:
            SpecError: the cluster has seen this id.
        """
        give_up_at = time.monotonic() + AGENT_WAIT_S
        while True:
            try:
                with self._translated():
                    self._client.submit_job(
                        entrypoint=command,
                        submission_id=job_id,
                        runtime_env={"working_dir": folder, "env_vars": dict(variables)},
                        metadata=dict(metadata),
                        entrypoint_num_cpus=num_cpus,
                    )
                return
            except InfrastructureError as error:
                if "already exists" in error.message:
                    said = f"{job_id} was submitted by somebody else meanwhile; see `tramontane list`"
                    raise SpecError(said) from error
                if "No available agent" not in error.message or time.monotonic() > give_up_at:
                    raise
            time.sleep(1.0)

    def job(self, job_id: str) -> SubmittedJob:
        """How a job is.

        Raises:
            UnknownJob: there is none of that id.
        """
        with self._translated(job_id):
            return submitted_job(self._client.get_job_info(job_id))

    def jobs(self) -> dict[str, SubmittedJob]:
        """All jobs that were submitted to this cluster, by id, the oldest first."""
        with self._translated():
            found = [submitted_job(details) for details in self._client.list_jobs() if details.submission_id]
        return {job.id: job for job in sorted(found, key=lambda job: job.started_at or "")}

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; False if it had.

        Raises:
            UnknownJob: there is none of that id.
        """
        with self._translated(job_id):
            return bool(self._client.stop_job(job_id))

    def logs(self, job_id: str) -> str:
        """All that a job has printed so far.

        Raises:
            UnknownJob: there is none of that id.
        """
        with self._translated(job_id):
            return str(self._client.get_job_logs(job_id))

    def stream(self, job_id: str) -> AsyncIterator[str]:
        """What a job prints from its beginning on, until it ends or the connection does (`LOG_ERRORS`, or quietly)."""
        stream: AsyncIterator[str] = self._client.tail_job_logs(job_id)
        return stream

    @contextlib.contextmanager
    def _translated(self, job_id: str | None = None) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise SpecError(
                f"{self.address} asks for Ray's token, and this machine has none or another one; put the cluster's "
                "into ~/.ray/auth_token (mode 600), or name its file by RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise InfrastructureError(
                f"nothing answers at {self.address} ({type(error).__name__}); check the address, that the head is up, "
                "and that its port 8265 can be reached from here (`kubectl port-forward`, `ray dashboard`)"
            ) from error
        except (RuntimeError, KeyError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")] or [type(error).__name__]
            if job_id is not None and "status code 404" in lines[0]:
                raise UnknownJob(f"{self.address} has no job {job_id}; see `tramontane list`") from error
            raise InfrastructureError(f"{self.address} answered: {lines[-1][:500]}; try again") from error


def _checked(address: str) -> str:
    """The address without a slash at its end. Ray would import a module by the name of any other scheme."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError(f"--address {address!r}: give the URL of the cluster's dashboard, e.g. http://head:8265")
    if parts.username or parts.password:
        raise SpecError("--address holds a user or password, which would be printed; Ray's token comes from its file")
    return address.rstrip("/")


@functools.cache
def _client_class() -> Any:
    """Ray's client with a time limit on every request, for want of which a silent proxy would hold us for ever, and for
    the address that it is given: Ray lets RAY_ADDRESS, which every job of a cluster has, overrule it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def __init__(self, address: str, **options: Any) -> None:
            with _unset(*_OVERRULING):
                super().__init__(address, **options)

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=TIMEOUT_S, **options)

    return Client


@contextlib.contextmanager
def _unset(*names: str) -> Iterator[None]:
    """Run the block without these environment variables."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)
