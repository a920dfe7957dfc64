"""Has a worker process of an engine end with the process that started it.

vLLM gives this to each worker as its `worker_extension_cls`, so that importing this module, the first thing a worker
does with it, runs in the worker. Needed on an engine's further nodes: workers there wait for the first node's messages
without a time limit, and vLLM's own sign of a dead parent, a closed pipe, doesn't wake them (0.30: killed by SIGTERM,
the parent left its worker running). Ray kills what a dead actor leaves behind, unless the node's raylet died first.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PR_SET_PDEATHSIG = 1
QUALIFIED_NAME = f"{__name__}.EndsWithParent"


class EndsWithParent:
    """Adds nothing to a worker: see the module."""


def _end_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it has ended before
        os._exit(1)


_end_with_parent()
