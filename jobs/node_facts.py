"""What one node of a cluster says of itself: versions, Ray's authentication, memory, disk. Runs on the node.

Judges nothing; never reads a token, only whether there is one and who may read its file.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from jobs.advisories import installed_versions

_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node, as a process of Ray on it sees it. Sizes in bytes."""

    python: str
    versions: dict[str, str] = field(default_factory=dict)
    auth_mode: str = "unknown"
    """`token` or `disabled`."""
    token_file_mode: int | None = None
    """Permission bits of the token's file; None where there is no such file."""
    memory: int = _NO_LIMIT
    """Of the machine, or of the container where that has less."""
    shared_memory: int = _NO_LIMIT
    """Size of /dev/shm."""
    open_files: int = _NO_LIMIT
    """Files that a process may open."""
    has_avx512: bool = True
    model_folder: str = ""
    """Where fetched models go."""
    model_folder_free: int = _NO_LIMIT
    has_weights: bool = False
    """Whether the model's weights lie where this machine's driver has them."""


def read_node_facts(model_path: str | None = None, model_folder: str | None = None) -> NodeFacts:
    """Look at the machine that this runs on; `model_path` is the model's directory, `model_folder` where it would be
    fetched to, by default the program's own cache.
    """
    from pipeline.model import cache_directory

    folder = model_folder or str(cache_directory())
    return NodeFacts(
        python=platform.python_version(),
        versions=installed_versions(),
        auth_mode=_auth_mode(),
        token_file_mode=_token_file_mode(),
        memory=_memory(),
        shared_memory=_disk("/dev/shm").total if os.path.isdir("/dev/shm") else 0,  # noqa: S108
        open_files=_open_files(),
        has_avx512=_has_avx512(),
        model_folder=folder,
        model_folder_free=_disk(folder).free,
        has_weights=model_path is not None and any(Path(model_path).glob("*.safetensors")),
    )


def _auth_mode() -> str:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return "token" if is_token_auth_enabled() else "disabled"


def _token_file_mode() -> int | None:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        return None


def _open_files() -> int:
    """The hard limit: Ray raises the soft one to it for its own processes, vLLM for its servers."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _NO_LIMIT if limit == resource.RLIM_INFINITY else limit


def _memory() -> int:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(installed, int(Path(file).read_text()))
        except (OSError, ValueError):  # absent, or `max`
            continue
    return installed


def _has_avx512() -> bool:
    try:
        return " avx512f " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def _disk(folder: str) -> shutil._ntuple_diskusage:
    """Of the folder, or of the nearest one above it that exists."""
    path = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.is_dir()))
