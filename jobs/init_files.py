"""The files that `tramontane init` writes: a spec with every field, or a complete job out of jobs/examples/.

Invariant: either all files are written or, when one of them is there already, none is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from jobs.init_template import init_template, yaml_text
from pipeline.errors import SpecError

EXAMPLES = Path(__file__).with_name("examples")
_NAMED = re.compile(r"jobs/examples/([\w.-]+)")
"""How an example's spec names its files: from the root of a checkout, where it can be run as it is."""


def spec_file(path: Path) -> dict[Path, str]:
    """The spec that has everything in it."""
    return {path: init_template(name=path.stem)}


def example_files(name: str, path: Path) -> dict[Path, str]:
    """The example's spec as `path`, and beside it the files that it reads.

    Raises:
        SpecError: there is no such example.
    """
    specs = {spec.stem: spec for spec in sorted(EXAMPLES.glob("*.yaml"))}
    if name not in specs:
        raise SpecError(f"--example {name!r} is unknown; use one of {', '.join(specs)}")
    text = specs[name].read_text(encoding="utf-8")
    inputs = list(dict.fromkeys(_NAMED.findall(text)))
    moved = _NAMED.sub(lambda found: yaml_text((path.parent / found[1]).as_posix()), text)
    return {path: moved} | {path.parent / each: (EXAMPLES / each).read_text(encoding="utf-8") for each in inputs}


def write_files(files: Mapping[Path, str], *, force: bool) -> None:
    """Write them; over what is there only with `force`.

    Raises:
        SpecError: one of them exists, or can't be written.
    """
    if taken := [str(path) for path in files if path.exists()] if not force else []:
        verb, what = ("exists", "it") if len(taken) == 1 else ("exist", "them")
        raise SpecError(f"{' and '.join(taken)} {verb}; choose another name, or overwrite {what} with --force")
    for path, text in files.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            cure = "choose a file in a folder that exists"
            raise SpecError(f"{path} can't be written: {error.strerror}; {cure}") from None
