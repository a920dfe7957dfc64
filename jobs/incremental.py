"""Runs an incremental job: finishes what the last run left, claims what is new, and does it; each run in its folder.

A command takes one step after the other, each from a fresh look at the chain of claims, until nothing is left to do.
Guarantees:
- a row is done by one run, and by another only if it changed and `input.changed` is `redo`.
- a run that was cut short is finished, or gives back what it hadn't done, before anything new is claimed.
- when there is nothing to do, nothing is written.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jobs.chain import Chain, Link, read_chain, sweep_objects
from jobs.claiming import claim_of, job_of, next_folder, release_of, run_of, settings_of, spec_of_run, whether_finished
from jobs.engines import kept_engines
from jobs.job_spec import JobSpec
from jobs.new_rows import NewRows, find_new
from jobs.preflight import reaching
from jobs.prepare import PreparedJob, prepare
from jobs.report import id_warnings
from jobs.run import RunOptions, run_job
from jobs.spec_incremental import SINCE_LAST_RUN
from jobs.summary import read_summary
from pipeline.errors import SpecError
from pipeline.lease import acquire_lease
from pipeline.ledger import Ledger
from pipeline.listing import stat_file
from pipeline.parts import committed_parts
from pipeline.resume import Change, changed_fields
from pipeline.shards import Plan
from pipeline.storage import Store


@dataclass(frozen=True, slots=True)
class Command:
    """What somebody asked for."""

    spec: JobSpec
    options: RunOptions
    say: Callable[[str], None]
    finished: Callable[[PreparedJob, dict[str, Any]], None] = lambda _job, _summary: None
    """Called with each run's end."""
    means: dict[str, Any] = field(default_factory=dict)
    """`fleet`, `pools` or `kept` of `run_job`."""


@dataclass(frozen=True, slots=True)
class _Begin:
    folder: str
    found: NewRows
    job: PreparedJob
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class _Finish:
    link: Link
    job: PreparedJob


@dataclass(frozen=True, slots=True)
class _GiveBack:
    link: Link
    reason: str


def run_if_incremental(
    spec: JobSpec,
    options: RunOptions,
    *,
    say: Callable[[str], None],
    finished: Callable[[PreparedJob, dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Run or retry an incremental job, see below; None for a job of any other kind, which is left alone.

    Raises:
        SpecError: what only incremental jobs have is asked of another one.
    """
    if spec.input.new == SINCE_LAST_RUN:
        with kept_engines() as kept:  # of several nights or retried runs the first loads the weights
            command = Command(spec, options, say, finished, {"kept": kept})
            return retry_incremental(command) if options.only_failed else run_incremental(command)
    if options.accept_changes:
        raise SpecError("--accept-changes is for jobs with input.new: since_last_run; others have one run, see resume")
    return None


def run_incremental(command: Command) -> dict[str, Any]:
    """Finish the last run if need be, then do what is new; `exit_code` in the report is that of the last of these runs.

    Raises:
        RunError: as `run_job`; what was claimed and committed stays, and the same command goes on.
    """
    store, runs = Store(command.spec.output.path), list[dict[str, Any]]()
    while True:
        with reaching(store):
            chain = read_chain(store)
            step = _next_step(command, chain)
        if step is None:
            return _report(store, runs)
        with acquire_lease(store, run_id=uuid.uuid4().hex[:8]) as lease:
            if read_chain(store).head != chain.head:
                continue  # somebody else took a step in between: look again
            if isinstance(step, _GiveBack):
                _give_back(command, chain, step)
                continue
            if isinstance(step, _Begin):
                sweep_objects(chain)
                claim = claim_of(chain, step.folder, step.found, step.job, step.changes)
                lease.check()
                chain.create(claim)
            else:
                claim = step.link.claim
            summary = run_job(step.job, command.options, say=command.say, **command.means)
        command.finished(step.job, summary)
        resumed = isinstance(step, _Finish)
        runs.append({"run": claim.run, "folder": claim.folder, "resumed": resumed, "summary": summary})
        if summary["exit_code"] or not resumed:
            return _report(store, runs)


def retry_incremental(command: Command) -> dict[str, Any]:
    """Do failed rows again in every run that has such rows, oldest first.

    Raises:
        SpecError: the last run isn't finished, or an earlier one had other settings.
        RunError: as `run_job`.
    """
    store, runs = Store(command.spec.output.path), list[dict[str, Any]]()
    chain = read_chain(store)
    if chain.last is None:
        raise SpecError(f"output.path {store.root} holds no run, so there is nothing to retry; use `tramontane run`")
    if not whether_finished(chain, chain.last):
        raise SpecError(f"{chain.last} in {store.root} isn't finished; `tramontane run` does that first")
    for link in chain.effective:
        summary = read_summary(chain.run_store(link))
        if summary is None or not any(summary["counts"][status] for status in command.options.statuses):
            continue
        job = job_of(command.spec, chain, link)
        _refuse_changed_files(chain, link, job.plan, command.options)
        summary = run_job(job, command.options, say=command.say, **command.means)
        command.finished(job, summary)
        runs.append({"run": link.claim.run, "folder": link.claim.folder, "resumed": True, "summary": summary})
        if summary["exit_code"]:
            break
    if not runs:
        command.say(f"nothing to retry in the {len(chain.effective):,} runs of {store.root}")
    return _report(store, runs)


def _refuse_changed_files(chain: Chain, link: Link, plan: Plan, options: RunOptions) -> None:
    """Raise SpecError when rows to do again can't be read any more as they were."""
    shards = Ledger(chain.run_store(link)).failed_parts(statuses=options.statuses, kinds=options.kinds)
    changed = sorted({shard.file for shard in shards.values() if not _is_as_planned(plan, shard.file_index)})
    if changed:
        raise SpecError(
            f"{link} in {chain.store.root} has failed rows of {changed[0]}, which isn't the file any more that it was; "
            "put the old file back, or have `input.changed: redo` do rows again when they change"
        )


def _report(store: Store, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"output": store.root, "runs": runs, "exit_code": runs[-1]["summary"]["exit_code"] if runs else 0}


def _next_step(command: Command, chain: Chain) -> _Begin | _Finish | _GiveBack | None:
    """What to do next, from reads alone.

    Raises:
        SpecError: settings differ from those of the run before.
    """
    if chain.last is not None and not whether_finished(chain, chain.last):
        return _for_unfinished(command, chain, chain.last)
    spec, say = command.spec, command.say
    found = find_new(spec, chain)
    for note in found.notes:
        say(f"note: {note}")
    if not found.num_rows:
        say(f"nothing new: {len(chain.effective):,} runs in {chain.store.root} have all of {found.num_files:,} files")
        return None
    folder = next_folder(chain)
    job = run_of(prepare(spec_of_run(spec, folder), source=found.source))
    before = chain.effective[-1].claim if chain.effective else None
    changes = changed_fields(before.settings, settings_of(job)) if before else []
    if changes and not command.options.accept_changes:
        raise SpecError(
            f"the settings aren't those of run {len(chain.links)} in {chain.store.root}; changed since then:\n"
            + "".join(f"  {change}\n" for change in changes)
            + "Undo the change, or add --accept-changes to go on with it from this run on; an empty output.path would "
            "do all rows again"
        )
    if spec.input.new_by != "id":  # whose ids were looked at already
        for line in id_warnings(job):
            say(line)
    changed = f", {found.changed_rows:,} of them changed," if found.changed_rows else ""
    say(f"{found.num_rows:,} new rows{changed} in {len(found.source.files):,} of {found.num_files:,} files")
    return _Begin(folder, found, job, changes)


def _for_unfinished(command: Command, chain: Chain, link: Link) -> _Finish | _GiveBack:
    plan = chain.plan_of(link.claim)
    committed = committed_parts(chain.run_store(link))
    if changed := _changed_files(plan, committed):
        return _GiveBack(link, f"{changed[0]} isn't the file any more that it began to read")
    job = job_of(command.spec, chain, link)
    changes = changed_fields(link.claim.settings, settings_of(job))
    if changes and committed and not command.options.accept_changes:
        raise SpecError(
            f"{link} in {chain.store.root} isn't finished, and these settings changed since it began:\n"
            + "".join(f"  {change}\n" for change in changes)
            + "Undo the change to finish it, or add --accept-changes to do the rest of its rows with the new settings"
        )
    if changes:
        return _GiveBack(link, f"settings changed: {'; '.join(map(str, changes))}")
    command.say(f"{link} isn't finished: that first")
    return _Finish(link, job)


def _changed_files(plan: Plan, committed: set[str]) -> list[str]:
    """Files with rows still to do that aren't what they were when the run was planned."""
    numbers = sorted({shard.file_index for shard in plan if shard.part_name not in committed})
    return [plan.files[number].path for number in numbers if not _is_as_planned(plan, number)]


def _is_as_planned(plan: Plan, number: int) -> bool:
    file = plan.files[number]
    try:
        now = stat_file(file.path)
    except FileNotFoundError:
        return False
    return (now.size, now.version) == (file.size, file.version)


def _give_back(command: Command, chain: Chain, step: _GiveBack) -> None:
    """Under the run's own lease, so that no process that was taken for dead commits anything of it later."""
    store = chain.run_store(step.link)
    with acquire_lease(store, run_id=uuid.uuid4().hex[:8]) as lease:
        release = release_of(chain, step.link, committed_parts(store), step.reason)
        lease.check()
        chain.release(release)
        left = step.link.claim.rows - release.kept_rows
        Ledger(store, lease=lease).record_event("released", rows=left, reason=step.reason)
    command.say(f"{step.link} ends with {release.kept_rows:,} rows, and gives {left:,} back: {step.reason}")
