"""What a run can be refused for before it touches its output, and whether it will have anything to do.

Reads only: whoever is refused here finds the output as it was, or still without a folder. Another process may change it
meanwhile, so whatever results depend on is looked at again under the lease.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jobs.chain import refuse_job_directory
from jobs.prepare import PreparedJob
from jobs.summary import read_summary
from jobs.work import RunOptions, refuse_unfinished
from pipeline.errors import InfrastructureError, SpecError
from pipeline.ledger import Ledger
from pipeline.storage import Store


def preflight(job: PreparedJob, options: RunOptions, store: Store) -> bool:
    """Return whether there seems to be work.

    Raises:
        SpecError: a retry that makes no sense, results of a different job, files of somebody else, `output.resume`.
        InfrastructureError: the output can't be reached.
    """
    with reaching(store):
        refuse_job_directory(store)
        ledger = Ledger(store)
        if options.only_failed:
            _refuse_retry(ledger, options)
        opened = ledger.look(job.plan, job.fingerprint, resume=job.spec.output.resume)
        if options.only_failed:
            refuse_unfinished(ledger)
        if opened.num_committed < opened.plan.num_shards:
            return True
        return opened.num_committed > 0 and _has_rows_to_retry(ledger, options)


def _refuse_retry(ledger: Ledger, options: RunOptions) -> None:
    others = [status for status in options.statuses if status != "failed"]
    if options.kinds and others:
        raise SpecError(
            f"--kind {options.kinds[0]} chooses among failed rows, but --status {others[0]} has no kinds; "
            "give one of the two, or retry twice"
        )
    if ledger.fingerprint() is None:
        root = ledger.store.root
        raise SpecError(f"output.path {root} holds no run, so there is nothing to retry; use `tramontane run`")


def _has_rows_to_retry(ledger: Ledger, options: RunOptions) -> bool:
    """By the summary, which is there when nothing was begun since; else by all footers."""
    selection = options.selection
    if selection is None:
        return False
    summary = read_summary(ledger.store)
    if summary is None:
        return bool(ledger.failed_parts(statuses=selection.statuses, kinds=selection.kinds))
    kinds = summary["error_kinds"]
    return any(summary["counts"][status] for status in selection.statuses) and (
        selection.kinds is None or any(kinds.get(kind) for kind in selection.kinds)
    )


@contextlib.contextmanager
def reaching(store: Store, *, nothing_ran: bool = True) -> Iterator[None]:
    """Raise what the storage answers within the block as errors that say what to do.

    Raises:
        SpecError: it may not be used, and `nothing_ran`: the spec can still be corrected.
        InfrastructureError: it can't be reached, is full, or refuses what it took before.
    """
    try:
        yield
    except OSError as error:
        if nothing_ran and isinstance(error, PermissionError | NotADirectoryError):
            raise SpecError(
                f"output {store.root} can't be used: {error}; correct output.path or credentials"
            ) from error
        raise InfrastructureError(
            f"output {store.root} can't be used now: {error}; what is committed is safe: rerun the same command"
        ) from error
