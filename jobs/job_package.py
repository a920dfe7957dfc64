"""The folder that is sent to a cluster with a job: this program's code, the spec, and what was installed here.

Guarantees:
- it holds the three packages' Python files, two files made here and small files that the spec names; nothing else of
  this machine.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from jobs.advisories import installed_versions
from jobs.submission import SPEC_FILE
from pipeline.errors import SpecError

PACKAGES = ("pipeline", "cluster", "jobs")
SUBMITTER_FILE = "submitter.json"
MAX_FILES_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Submitter:
    """What the cluster is to know of the machine that a job was submitted from."""

    python: str
    versions: dict[str, str]
    requirements: list[str]
    """What the code that is sent needs to be installed there, as in pyproject.toml."""
    references: dict[str, list[str]] = field(default_factory=dict)
    """The job's variables that are filled from the cluster's own, and from which of these."""


@contextlib.contextmanager
def job_package(spec_text: str, references: Mapping[str, Sequence[str]], files: Sequence[str] = ()) -> Iterator[str]:
    """A temporary folder for `JobsApi.submit`; gone after the block.

    Args:
        spec_text: the spec, as it is.
        references: of the job's variables, see `Submitter`.
        files: relative paths of what else the spec names; they have the same path there.

    Raises:
        SpecError: a file can't be sent.
    """
    _check(files)
    with tempfile.TemporaryDirectory(prefix="tramontane-submit-") as name:
        folder = Path(name)
        root = Path(__file__).resolve().parents[1]
        for package in PACKAGES:
            (folder / package).mkdir()
            for source in sorted((root / package).glob("*.py")):
                shutil.copyfile(source, folder / package / source.name)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file)
        (folder / SPEC_FILE).write_text(spec_text, encoding="utf-8")
        submitter = _this_machine({target: list(names) for target, names in references.items()})
        (folder / SUBMITTER_FILE).write_text(json.dumps(asdict(submitter)), encoding="utf-8")
        yield name


def _check(files: Sequence[str]) -> None:
    for file in files:
        steps = Path(file).parts
        if ".." in steps or steps[0] in (*PACKAGES, SPEC_FILE, SUBMITTER_FILE) or not Path(file).is_file():
            raise SpecError(f"{file} can't be sent along; give a file in a folder below this one, or a URL")
    size = sum(Path(file).stat().st_size for file in files)
    if size > MAX_FILES_BYTES:
        raise SpecError(f"{', '.join(files)}: {size:,} bytes, more than the 8 MiB that are sent along; give URLs")


def read_submitter(folder: Path) -> Submitter:
    """On the cluster: who sent this folder."""
    return Submitter(**json.loads((folder / SUBMITTER_FILE).read_text(encoding="utf-8")))


def _this_machine(references: dict[str, list[str]]) -> Submitter:
    try:
        needed = [entry for entry in requires("tramontane") or [] if "extra ==" not in entry]
    except PackageNotFoundError:  # run from a checkout that isn't installed
        needed = []
    return Submitter(platform.python_version(), installed_versions(), needed, references)
