"""From what is new to a claim on it, and from a claim to the run that does it.

Reads runs and stores what claims name; appends nothing to the chain itself. Invariant: a run is planned once, when its
rows are claimed, and whoever goes on with it goes by that plan.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from jobs.chain import RUNS, Chain, Link, put_keys, put_object
from jobs.claims import Claim, ClaimedFile, Release
from jobs.job_spec import JobSpec
from jobs.new_rows import NewRows, Source, known_by
from jobs.prepare import PreparedJob, prepare
from jobs.summary import read_summary
from pipeline.inputs import InputFile
from pipeline.listing import FoundFile
from pipeline.resume import Change

_INPUT_FILES = "input_files."
_WHERE_ROWS_ARE = "input.path"


def settings_of(job: PreparedJob) -> dict[str, str]:
    """What results depend on besides rows: the fingerprint less the input."""
    return {
        name: value
        for name, value in job.fingerprint.items()
        if name != _WHERE_ROWS_ARE and not name.startswith(_INPUT_FILES)
    }


def next_folder(chain: Chain) -> str:
    """Folder of the next run: its number, which orders runs, and the day in UTC."""
    return f"{RUNS}/{len(chain.links) + 1:06d}-{datetime.now(UTC).date()}"


def spec_of_run(spec: JobSpec, folder: str) -> JobSpec:
    """The job's spec with a run's folder as its output."""
    output = spec.output.model_copy(update={"path": f"{spec.output.path.rstrip('/')}/{folder}"})
    return spec.model_copy(update={"output": output})


def job_of(spec: JobSpec, chain: Chain, link: Link) -> PreparedJob:
    """The job with a run's rows and folder, whatever the input holds by now."""
    plan = chain.plan_of(link.claim)
    job = prepare(spec_of_run(spec, link.claim.folder), source=Source(plan.files, plan.picks))
    return run_of(job.with_plan(plan))


def run_of(job: PreparedJob) -> PreparedJob:
    """The job as its runs are told apart: by their files, not by the pattern that found them."""
    fields = {name: value for name, value in job.fingerprint.items() if name != _WHERE_ROWS_ARE}
    return replace(job, fingerprint=fields)


def claim_of(chain: Chain, folder: str, found: NewRows, job: PreparedJob, changes: Sequence[Change]) -> Claim:
    """What to append to the chain for this job, whose plan and keys are stored already."""
    store, previous = chain.store, chain.last
    files = [_claimed(file, rows) for file, rows in zip(job.plan.files, job.plan.rows_of_file, strict=True)]
    files += [_claimed(file, 0) for file in found.others]
    return Claim(
        run=len(chain.links) + 1,
        folder=folder,
        claimed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        previous=previous.sha256 if previous else None,
        settings=settings_of(job),
        known_by=known_by(job.spec),
        files=tuple(files),
        rows=job.plan.num_rows,
        changed_rows=found.changed_rows,
        plan=put_object(store, "plan.json", job.plan.to_json().encode()),
        keys=None if found.keys is None else put_keys(store, found.keys),
        accepted_changes=tuple(map(str, changes)),
    )


def whether_finished(chain: Chain, link: Link) -> bool:
    """Whether nothing of the run's rows is left to do for it: all have results, or it released them."""
    if link.released is not None:
        return True
    summary = read_summary(chain.run_store(link))
    return summary is not None and not summary["counts"]["missing_rows"]


def release_of(chain: Chain, link: Link, committed: Collection[str], reason: str) -> Release:
    """The end of a run with no more than these parts."""
    shards = list(chain.plan_of(link.claim))
    kept = [shard for shard in shards if shard.part_name in committed]
    open_files = {shard.file_index for shard in shards if shard.part_name not in committed}
    num_planned = len({shard.file_index for shard in shards})
    return Release(
        run=link.claim.run,
        reason=reason,
        released_at=datetime.now(UTC).isoformat(timespec="seconds"),
        kept_rows=sum(shard.num_rows for shard in kept),
        kept_parts=tuple(shard.part_name for shard in kept),
        whole_files=tuple(number for number in range(num_planned) if number not in open_files),
    )


def _claimed(file: InputFile | FoundFile, rows: int) -> ClaimedFile:
    return ClaimedFile(file.path, file.size, file.version, rows)
