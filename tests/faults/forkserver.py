"""Child processes that start in some 20 ms, because a server forks them with their imports done.

A process has one such server, and the first test to use it decides what is preloaded: hence one list for all tests.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext

# pandas: pyarrow imports it at the first conversion from Python values, 0.8 s in every child otherwise.
_PRELOADED = [
    "pytest",
    "pandas",
    "s3fs",
    "aiobotocore.session",
    "tests.faults.mini_run",
    "tests.faults.crash_points",
    "tests.faults.lease_contender",
]


def forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def aws_environment() -> dict[str, str]:
    """What a child must be told of the S3 server, which was started after the server that forks it."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
