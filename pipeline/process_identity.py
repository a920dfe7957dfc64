"""Which process holds something, said so that another process on the same machine can tell whether it is gone.

A process id alone says nothing: ids are reused, and containers on one machine count their own. Invariant: `is_gone` is
True only when that very process can no longer run; when in doubt, it is not gone.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one boot of one machine."""

    host: str
    """For people; not compared."""
    pid: int
    process_table: str | None
    """Boot id and pid namespace: where `pid` means something. None where the system doesn't tell."""
    started_ticks: int | None
    """Start time in clock ticks since boot, which tells a reused pid."""

    def is_gone(self) -> bool:
        """Whether this process is known to have ended; False for one of elsewhere, of which nothing is known."""
        if self.process_table is None or self.process_table != _process_table():
            return False
        return _started_ticks(self.pid) != self.started_ticks


def this_process() -> ProcessIdentity:
    """Identity of the calling process."""
    pid = os.getpid()
    return ProcessIdentity(socket.gethostname(), pid, _process_table(), _started_ticks(pid))


def _process_table() -> str | None:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None when there is no such process or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
