"""Follows a job on a cluster to its end: its log as it grows, and how it ended.

The log comes over a connection that may break, stall or end early (ray#51601, ray#60665); whether the job has ended is
asked for, never concluded from the log.
Guarantees:
- every character of the log is written once and in order, however often the connection breaks.
- what is returned is the job's state when it had ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.ray_jobs import LOG_ERRORS, JobsApi, UnknownJob
from jobs.submission import SubmittedJob
from pipeline.errors import InfrastructureError

IDLE_S = 60.0
"""A stream that says nothing for so long is opened anew: a connection may be dead without either end knowing."""
UNREACHABLE_S = 900.0
"""After so long without an answer it is given up; the job may live."""
_PAUSE_S = 1.0
_LOG_ATTEMPTS = 5


@dataclass
class _Log:
    """Writes a log of which every stream begins at its first character."""

    write: Callable[[str], None]
    written: int = 0

    def add(self, text: str, *, at: int) -> int:
        """Write what is new of `text`, whose first character is number `at`; the number after its last one."""
        new = text[max(0, self.written - at) :]
        if new:
            self.write(new)
            self.written = at + len(text)
        return at + len(text)


def follow(jobs: JobsApi, job_id: str, *, write: Callable[[str], None], say: Callable[[str], None]) -> SubmittedJob:
    """Write the job's log until the job has ended; its last state.

    Raises:
        InfrastructureError: the cluster was silent for `UNREACHABLE_S`, or has forgotten the job.
        KeyboardInterrupt: Ctrl-C; the job goes on.
    """
    log = _Log(write)
    while True:
        asyncio.run(_stream(jobs, job_id, log))
        job = _ask(jobs, job_id, say)
        if not job.is_live:
            log.add(_rest(jobs, job_id, say), at=0)
            return job
        time.sleep(_PAUSE_S)


def _ask(jobs: JobsApi, job_id: str, say: Callable[[str], None]) -> SubmittedJob:
    """How the job is, as soon as the cluster says so."""
    began, is_cut = time.monotonic(), False
    while True:
        try:
            job = jobs.job(job_id)
        except UnknownJob as error:
            raise InfrastructureError(
                f"{jobs.address} has forgotten {job_id}: its head was replaced, and the job went with it; submit it "
                "again, it goes on where it stopped"
            ) from error
        except InfrastructureError as error:
            silence = time.monotonic() - began
            if silence > UNREACHABLE_S:
                raise InfrastructureError(
                    f"{jobs.address} didn't answer for {silence:.0f} s; {job_id} may still run: `tramontane status "
                    f"{job_id} --address {jobs.address}` says so once it answers"
                ) from error
            if not is_cut:
                say(f"the connection to {jobs.address} is cut; {job_id} goes on, and so does this once it is back")
            is_cut = True
            time.sleep(_PAUSE_S)
        else:
            if is_cut:
                say(f"{jobs.address} answers again; {job_id} is {job.state}")
            return job


def _rest(jobs: JobsApi, job_id: str, say: Callable[[str], None]) -> str:
    """The whole log of a job that has ended; nothing where the cluster answers, but has it no more."""
    for _ in range(_LOG_ATTEMPTS):
        with contextlib.suppress(InfrastructureError):
            return jobs.logs(job_id)
        _ask(jobs, job_id, say)
        time.sleep(_PAUSE_S)
    return ""


async def _stream(jobs: JobsApi, job_id: str, log: _Log) -> None:
    """Write what one stream has, until it ends, breaks or says nothing."""
    import aiohttp

    stream = jobs.stream(job_id)
    at = 0
    try:
        while True:
            text = await asyncio.wait_for(anext(stream), IDLE_S)
            at = log.add(text, at=at)
    except (StopAsyncIteration, TimeoutError, aiohttp.ClientError, *LOG_ERRORS):
        return
    finally:
        with contextlib.suppress(Exception):
            await stream.aclose()  # type: ignore[attr-defined]
