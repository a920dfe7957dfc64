"""`export --openai-batch`: a run's results as the two files that OpenAI's batch API gives.

Reads committed parts and nothing else, some rows at a time: memory doesn't grow with the run. Both files become visible
whole, `error.jsonl` first, or stay as they were.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any

from jobs.openai_results import REFINED_KINDS, RunFacts, result_line
from jobs.prepare import common_folder
from jobs.status import output_of
from pipeline.counters import RunCounters
from pipeline.errors import InfrastructureError, SpecError
from pipeline.ledger import EVENTS, RUN, Ledger
from pipeline.openai_requests import KEPT_OF_REQUESTS
from pipeline.parts import DATA, OpenPart, open_part, part_sizes
from pipeline.resume import fingerprint_digest
from pipeline.storage import Store

OUTPUT_FILE, ERROR_FILE = "output.jsonl", "error.jsonl"

_ROWS_AT_A_TIME = 256
_RESULTS = (
    *("input_file", "input_row", "sample_index", "status", "generated_text", "finish_reason", "error"),
    *("num_input_tokens", "num_cached_tokens", "num_generated_tokens"),
)
# Legal in JSON, but line breaks to `str.splitlines`, with which people read such files.
_LINE_BREAKS = str.maketrans({each: f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"})


def export_batch(output: str, folder: str, *, is_partial: bool = False, model: str | None = None) -> dict[str, Any]:
    """Write `output.jsonl` and `error.jsonl` to a directory or URL, in the input's order; returns what was written.

    `output` is a run's output, or its spec. With `is_partial` a run that isn't finished is exported as far as it is.
    `model` is what responses call the model, None for its source.

    Raises:
        SpecError: there is no run, it isn't finished, or the folder is no place for this.
        InfrastructureError: a part can't be read, or the files can't be written.
    """
    store, target = Store(output_of(output)), Store(folder)
    run = _Run.read(store, model)
    _refuse_inside(store, target)
    if run.missing_rows and not is_partial:
        raise SpecError(
            f"{store.root} has {run.missing_rows:,} of {run.num_rows:,} rows without a result; finish it with "
            "`tramontane run`, or export what there is with --partial"
        )
    try:
        with target.writing(OUTPUT_FILE) as results, target.writing(ERROR_FILE) as failures:
            num_results, num_errors = _write(run, results, failures)
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise SpecError(f"--openai-batch {folder} can't be written: {error}; choose another folder") from error
    except OSError as error:
        raise InfrastructureError(f"--openai-batch {folder} could not be written: {error}; run it again") from error
    return {
        "output": store.root,
        "files": [f"{target.root.rstrip('/')}/{name}" for name in (OUTPUT_FILE, ERROR_FILE)],
        "results": num_results,
        "errors": num_errors,
        "missing_rows": run.missing_rows,
    }


def export_lines(report: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    output, error = report["files"]
    lines = [f"{report['results']:,} results in {output}", f"{report['errors']:,} errors in {error}"]
    if report["missing_rows"]:
        lines.append(f"{report['missing_rows']:,} rows have no result yet: the run isn't finished")
    return lines


@dataclass(frozen=True, slots=True)
class _Run:
    """A run as an export needs it."""

    store: Store
    parts: dict[str, int]
    """Name -> size of those committed, in the order of the input."""
    num_rows: int
    missing_rows: int
    id_column: str | None
    input_root: str
    """Folder that all input files share."""
    digest: str
    facts: RunFacts

    @classmethod
    def read(cls, store: Store, model: str | None) -> _Run:
        ledger = Ledger(store)
        fields = ledger.fingerprint()
        if fields is None:
            raise SpecError(f"{store.root} holds no run; give the output directory or URL of one, or its spec")
        plan, sizes = ledger.plan, part_sizes(store)
        shards = [shard for shard in plan if shard.part_name in sizes]
        is_batch = _field(fields, "input.format") == "openai_batch"
        digest = fingerprint_digest(fields)
        return cls(
            store=store,
            parts={shard.part_name: sizes[shard.part_name] for shard in shards},
            num_rows=plan.num_rows,
            missing_rows=plan.num_rows - sum(shard.num_rows for shard in shards),
            id_column="custom_id" if is_batch else _field(fields, "input.id"),
            input_root=common_folder([file.path for file in plan.files]),
            digest=digest,
            facts=RunFacts(model or _field(fields, "model.source") or "unknown", _began(store), digest, is_batch),
        )

    def custom_id(self, row: Mapping[str, Any]) -> str | None:
        """The user's own id; else, unless the row is a line that should bring one, its file and row."""
        value = row.get(self.id_column) if self.id_column is not None else None
        if value is not None:
            return str(value)
        return None if self.facts.is_batch else f"{row['input_file'].removeprefix(self.input_root)}:{row['input_row']}"


def _field(fields: Mapping[str, str], name: str) -> str | None:
    """A setting that the run was made with, from its fingerprint."""
    value = json.loads(fields.get(name, "null"))
    return value if isinstance(value, str) else None


def _began(store: Store) -> int:
    """When the run began: its first event."""
    first = min(store.list(EVENTS), default=None)
    if first is None:
        return int(time.time())
    return int(datetime.fromisoformat(json.loads(store.read(f"{EVENTS}/{first}"))["time"]).timestamp())


def _write(run: _Run, results: IO[bytes], failures: IO[bytes]) -> tuple[int, int]:
    """Write every row's line to the file that it belongs to; returns how many went to each."""
    num_results = num_errors = 0
    for _, group in itertools.groupby(_rows(run), key=lambda row: (row["input_file"], row["input_row"])):
        samples = list(group)
        line = result_line(samples, run.custom_id(samples[0]), run.facts)
        file = failures if line.is_error else results
        file.write(json.dumps(line.value, ensure_ascii=False).translate(_LINE_BREAKS).encode() + b"\n")
        num_errors += line.is_error
        num_results += not line.is_error
    return num_results, num_errors


def _rows(run: _Run) -> Iterator[dict[str, Any]]:
    """All output rows, parts in the order of the input; a row's samples follow each other."""
    for name, size in run.parts.items():
        try:
            yield from _part_rows(run, name, size)
        except (InfrastructureError, FileNotFoundError) as error:
            if part_sizes(run.store).get(name) == size:
                raise
            raise InfrastructureError(
                f"part {name} of {run.store.root} was written again during the export; export once the run has ended"
            ) from error


def _part_rows(run: _Run, name: str, size: int) -> Iterator[dict[str, Any]]:
    part = open_part(run.store, name, size=size)
    if part.footer.extra.get("fingerprint", run.digest) != run.digest:
        raise InfrastructureError(
            f"part {name} in {run.store.root}/{DATA} was made by a different job; delete that one file and rerun"
        )
    for batch in part.batches(_columns(run, part), num_rows=_ROWS_AT_A_TIME):
        yield from batch.to_pylist()


def _columns(run: _Run, part: OpenPart) -> list[str]:
    names = list(_RESULTS)
    if run.facts.is_batch:
        kinds = RunCounters.from_json_bytes(part.footer.counters).totals.error_kinds
        names += [*KEPT_OF_REQUESTS, *(["body"] if REFINED_KINDS & set(kinds) else [])]
    elif run.id_column is not None:
        names.append(run.id_column)
    return [name for name in names if name in part.names]


def _refuse_inside(store: Store, target: Store) -> None:
    """Keep out of the run's own folders: what lies in `data/` would be taken for a part."""
    where = os.path.realpath(target.path("x")) if target.is_local else target.path("x")
    for name in (DATA, RUN, "routing"):
        own = os.path.realpath(store.path(name)) if store.is_local else store.path(name)
        if where.startswith(f"{own}/"):
            raise SpecError(f"--openai-batch {target.root} lies in a folder of the run itself; choose another one")
