"""What a batch is, and what is to be done about it next, from what is known of it. Pure: time is handed in.

    validating -> in_progress -> finalizing -> completed
        |             |---------------------> expired      24 hours after it was created, with what is done by then
        |             |-> cancelling -------> cancelled    likewise
        |             |-> finalizing -------> failed       its run failed again and again; likewise
        `-> failed                                         a line of its file is no request

A batch whose file is sound is in progress, though it may wait for others.
"""

from __future__ import annotations

from typing import Any, Literal

from openai.types import Batch, BatchError, BatchRequestCounts
from openai.types.batch import Errors

from cluster.batch_records import BatchFacts, End

Step = Literal["check", "run", "end"]
"""`check` reads its file, `run` answers its requests and writes results, `end`: nothing was begun, so it is over."""
NO_COUNTS = BatchRequestCounts(total=0, completed=0, failed=0)


def is_over(facts: BatchFacts) -> bool:
    """Whether nothing will change any more."""
    return facts.ended is not None or bool(facts.checked and facts.checked.errors)


def is_to_end(facts: BatchFacts, now: float) -> bool:
    """Whether it must come to its end with whatever is done."""
    return facts.cancel is not None or facts.given_up is not None or now >= facts.created.expires_at


def next_step(facts: BatchFacts, now: float) -> Step | None:
    """What a batch that no process works at needs; None for nothing."""
    if is_over(facts):
        return None
    if is_to_end(facts, now) and not facts.has_run:
        return "run" if facts.checked is not None and end_of(facts) == "expired" else "end"
    return "check" if facts.checked is None else "run"


def end_of(facts: BatchFacts) -> End:
    """How a batch ends that must, with what it has."""
    if facts.cancel is not None:
        return "cancelled"
    return "failed" if facts.given_up is not None else "expired"


def status_of(facts: BatchFacts) -> Any:
    """In OpenAI's words."""
    if facts.ended is not None:
        return facts.ended.status
    if facts.checked is not None and facts.checked.errors:
        return "failed"
    if facts.cancel is not None:
        return "cancelling"
    if facts.finalizing is not None or facts.given_up is not None:
        return "finalizing"
    return "validating" if facts.checked is None else "in_progress"


def describe(facts: BatchFacts, live: BatchRequestCounts | None) -> Batch:
    """The batch as OpenAI's API shows it; `live` counts what a run that isn't over has done."""
    created, ended = facts.created, facts.ended
    checked = facts.checked
    is_sound = checked is not None and not checked.errors
    return Batch(
        id=created.id,
        object="batch",
        endpoint=created.endpoint,
        completion_window="24h",
        input_file_id=created.input_file_id,
        model=created.model,
        metadata=created.metadata,
        status=status_of(facts),
        created_at=created.created_at,
        expires_at=created.expires_at,
        in_progress_at=checked.at if checked is not None and is_sound else None,
        finalizing_at=facts.finalizing.at if facts.finalizing else None,
        cancelling_at=facts.cancel.at if facts.cancel else None,
        **_end(facts),
        output_file_id=created.output_file_id if ended and ended.has_output else None,
        error_file_id=created.error_file_id if ended and ended.has_error_file else None,
        request_counts=_counts(facts, live),
        usage=ended.usage if ended else None,
    )


def _end(facts: BatchFacts) -> dict[str, Any]:
    """When it ended, under the name that OpenAI has for this end, and what was wrong."""
    if facts.ended is not None:
        return {f"{facts.ended.status}_at": facts.ended.at, "errors": _errors(facts.ended.errors)}
    if facts.checked is not None and facts.checked.errors:
        return {"failed_at": facts.checked.at, "errors": _errors(facts.checked.errors)}
    return {}


def _errors(errors: list[BatchError]) -> Errors | None:
    return Errors(object="list", data=errors) if errors else None


def _counts(facts: BatchFacts, live: BatchRequestCounts | None) -> BatchRequestCounts:
    if facts.ended is not None:
        return facts.ended.counts
    if live is not None:
        return live
    return NO_COUNTS if facts.checked is None else NO_COUNTS.model_copy(update={"total": facts.checked.num_requests})
