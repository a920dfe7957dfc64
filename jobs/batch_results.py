"""From a batch's run to its files: the lines of `jobs.openai_export`, and how the batch ended."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from openai.types import BatchRequestCounts, BatchUsage
from openai.types.batch_usage import InputTokensDetails, OutputTokensDetails

from cluster.batch_files import FileShelf
from cluster.batch_records import INPUT, RESULTS, RUN, BatchFacts, BatchFolder, End, Ended
from cluster.batch_states import end_of
from jobs.batch_check import input_ids
from jobs.openai_export import ERROR_FILE, OUTPUT_FILE, export_batch
from jobs.summary import read_summary
from pipeline.ledger import Ledger
from pipeline.storage import Store

EXPIRED = "batch_expired"


def finish(batch: BatchFolder, *, now: float) -> None:
    """Write the batch's files and note its end; what was being written by a process that died is written anew."""
    batch.note_finalizing()
    facts = batch.facts()
    folder = batch.path / RESULTS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    num_results, num_errors = _export(batch, facts)
    total = facts.checked.num_requests if facts.checked else 0
    status: End = "completed"
    if facts.cancel is not None or num_results + num_errors < total:
        status = end_of(facts)
    if status == "expired":
        num_errors += _tell_expired(batch)
    _keep(batch, folder / OUTPUT_FILE, facts.created.output_file_id, num_lines=num_results)
    _keep(batch, folder / ERROR_FILE, facts.created.error_file_id, num_lines=num_errors)
    batch.note_ended(
        Ended(
            at=int(now),
            status=status,
            counts=BatchRequestCounts(total=total, completed=num_results, failed=num_errors),
            errors=facts.given_up.errors if facts.given_up is not None and status == "failed" else [],
            has_output=num_results > 0,
            has_error_file=num_errors > 0,
            usage=_usage(batch),
        )
    )


def _export(batch: BatchFolder, facts: BatchFacts) -> tuple[int, int]:
    """Results and errors that the run has; how many of each."""
    run = batch.path / RUN
    if not run.is_dir() or Ledger(Store(str(run))).fingerprint() is None:
        return 0, 0
    report = export_batch(str(run), str(batch.path / RESULTS), is_partial=True, model=facts.created.model)
    return report["results"], report["errors"]


def _tell_expired(batch: BatchFolder) -> int:
    """An error for each request that has neither result nor error, as OpenAI has it; returns how many."""
    folder = batch.path / RESULTS
    told = {_digest(json.loads(line)["custom_id"]) for line in _lines(folder / OUTPUT_FILE, folder / ERROR_FILE)}
    error = {"code": EXPIRED, "message": "not answered within the completion window", "param": None, "line": None}
    count = 0
    with (folder / ERROR_FILE).open("a", encoding="utf-8") as file:
        for custom_id in input_ids(str(batch.path / INPUT)):
            if (digest := _digest(custom_id)) not in told:
                name = f"batch_req_{digest.hex()}"
                line = {"id": name, "custom_id": custom_id, "response": None, "error": error}
                file.write(json.dumps(line) + "\n")
                count += 1
    return count


def _lines(*paths: Path) -> Any:
    for path in paths:
        if path.exists():
            with path.open(encoding="utf-8", newline="\n") as file:
                yield from file


def _digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def _keep(batch: BatchFolder, path: Path, file_id: str, *, num_lines: int) -> None:
    if num_lines:
        with path.open("rb") as content:
            name = f"{batch.path.name}_{path.name}"
            FileShelf(batch.root).add(batch.owner, content, name=name, purpose="batch_output", file_id=file_id)


def _usage(batch: BatchFolder) -> BatchUsage | None:
    """Tokens of the whole run; None of one that was killed before it could sum them up."""
    summary = read_summary(Store(str(batch.path / RUN)))
    if summary is None:
        return None
    tokens = summary["tokens"]
    return BatchUsage(
        input_tokens=tokens["input"],
        input_tokens_details=InputTokensDetails(cached_tokens=tokens["cached"]),
        output_tokens=tokens["generated"],
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=tokens["input"] + tokens["generated"],
    )
