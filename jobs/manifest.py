"""`manifest`: a fleet file, and a job's spec where one is run, to the text of a manifest."""

from __future__ import annotations

from pathlib import Path

from cluster.manifests import Job, manifest
from jobs.fleet_file_source import load_fleet_file, read_yaml_text
from jobs.spec import parse_spec
from jobs.submission import files_to_send
from pipeline.errors import SpecError


def write_manifest(fleet: Path, *, target: str, job: Path | None, output: Path | None) -> str:
    """The manifest's text; written to `output` where that is given.

    Raises:
        SpecError: a file can't be read, is wrong, or can't be made into this target.
    """
    text = manifest(load_fleet_file(fleet), target, read_job(job) if job is not None else None)
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SpecError(
                f"{output} can't be written: {error.strerror}; name a file in a folder that exists"
            ) from None
    return text


def read_job(path: Path) -> Job:
    """A job as manifests see it.

    Raises:
        SpecError: its spec is wrong.
    """
    text = read_yaml_text(path, cure="`tramontane init` writes one to start from")
    spec = parse_spec(text, name=str(path))
    if beside := files_to_send(spec):
        raise SpecError(
            f"{path} names {', '.join(beside)}, which a manifest doesn't hold; put what it says into the spec, use a "
            "URL, or let `tramontane submit` send it along"
        )
    paths = [spec.input.path] if isinstance(spec.input.path, str) else spec.input.path
    return Job(text, spec.fleet, paths, spec.output.path, does_what_is_new=spec.input.new == "since_last_run")
