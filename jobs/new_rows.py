"""Which rows of its input an incremental job hasn't done: files by path, days by partition, rows by id or content.

Reads listings, the chain of claims and, for rows, the new files' columns; writes nothing. Invariant: what is found was
claimed by no run, or is asked for again because it changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from jobs.chain import Chain, read_chain
from jobs.claims import Claim, ClaimedFile
from jobs.job_spec import JobSpec
from jobs.partitions import by_day
from jobs.spec_incremental import SINCE_LAST_RUN
from pipeline import row_picks
from pipeline.errors import SpecError
from pipeline.inputs import InputFile, list_inputs, look_into
from pipeline.listing import FoundFile, find_files
from pipeline.row_keys import Keys, Search, one_of_each, read_keys, same_rows
from pipeline.storage import Store
from pipeline.templating import needed_columns

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of one run."""

    files: tuple[InputFile, ...]
    picks: tuple[bytes | None, ...] = ()
    """As in `shards.Plan`."""


@dataclass(frozen=True, slots=True)
class NewRows:
    """What there is to do."""

    source: Source
    num_rows: int
    changed_rows: int = 0
    """Of these, rows that an earlier run has in another state."""
    others: tuple[FoundFile, ...] = ()
    """Files without new rows that need no second look."""
    keys: Keys | None = None
    """Of the rows to do, when rows are told apart."""
    num_files: int = 0
    """That `input.path` matches."""
    notes: tuple[str, ...] = ()
    """What people should know of what is left out."""


def source_of(spec: JobSpec) -> Source:
    """The rows that the next run would have: all, or the new ones of an incremental job.

    Raises:
        SpecError, InfrastructureError: as `find_new` and `list_inputs`.
    """
    if spec.input.new != SINCE_LAST_RUN:
        return Source(tuple(list_inputs(spec.input.path, spec.input.format, prefix=spec.input.prefix or "")))
    return find_new(spec, read_chain(Store(spec.output.path))).source


def known_by(spec: JobSpec) -> dict[str, Any]:
    """What tells rows apart, as claims record it; `columns` None stands for all."""
    source = spec.input
    columns = sorted(needed_columns(spec.prompt, spec.sampling))
    if source.new_by == "content":
        keep = spec.output.keep
        columns = [] if keep == "all" else sorted({*columns, *(keep if isinstance(keep, list) else ())})
    return {
        "by": source.new_by,
        "id": source.id if source.new_by == "id" else None,
        "partition": source.partition,
        "columns": columns or None if source.new_by in ("id", "content") else None,
    }


def find_new(spec: JobSpec, chain: Chain) -> NewRows:
    """Look for what no claim of the chain has.

    Raises:
        SpecError: a path matches nothing, has no partition, or rows were told apart by something else before.
        InfrastructureError: the storage doesn't answer, or a file changed meanwhile.
    """
    refuse_other_identity(spec, chain)
    found = find_files(spec.input.path)
    search = {"file": _new_files, "partition": _new_days}.get(spec.input.new_by, _new_rows)
    return replace(search(spec, chain, found), num_files=len(found))


def refuse_other_identity(spec: JobSpec, chain: Chain) -> None:
    """Raise SpecError when earlier runs told rows apart by something else: all rows would seem to be new."""
    now, redo = known_by(spec), spec.input.changed == "redo"
    for link in chain.effective:
        before = link.claim.known_by
        names = ["by", "id", "partition"] + (["columns"] if redo or now["by"] == "content" else [])
        if wrong := [name for name in names if before[name] != now[name]]:
            changes = "; ".join(f"{name}: {before[name]} -> {now[name]}" for name in wrong)
            raise SpecError(
                f"{link} told new rows from known ones in another way ({changes}), so that rows which are done would "
                "seem new or changed; undo the change, or choose an empty output.path to do all rows again"
            )


def _new_files(spec: JobSpec, chain: Chain, found: Sequence[FoundFile]) -> NewRows:
    known = {file.path: (file.size, file.version) for file in _covered(chain)}
    changed = [file for file in found if known.get(file.path, _version(file)) != _version(file)]
    wanted = [file for file in found if file.path not in known]
    notes: list[str] = []
    if changed and spec.input.changed == "redo":
        again = {file.path for file in (*wanted, *changed)}
        wanted = [file for file in found if file.path in again]
    elif changed:
        notes.append(_left("files", [file.path for file in changed]))
    return _whole_files(spec, wanted, {file.path for file in changed}, notes)


def _new_days(spec: JobSpec, chain: Chain, found: Sequence[FoundFile]) -> NewRows:
    key = spec.input.partition or ""
    known, done = _covered_days(chain, key)
    today = datetime.now(ZoneInfo(spec.input.timezone)).date()
    wanted: list[FoundFile] = []
    changed: dict[date, list[FoundFile]] = {}
    notes: list[str] = []
    for day, files in sorted(by_day(found, key).items()):
        if day >= today:
            notes.append(f"{day} isn't over in {spec.input.timezone}: {len(files):,} files wait for a later run")
        elif day not in known:
            wanted += files
        elif known[day] != {(file.path, *_version(file)) for file in files}:
            changed[day] = files
    if changed and spec.input.changed == "redo":
        wanted += [file for files in changed.values() for file in files]
    elif changed:
        notes.append(_left("days", [str(day) for day in changed]))
    others = tuple(file for file in wanted if (file.path, *_version(file)) in done)
    again = {file.path for files in changed.values() for file in files}
    rest = [file for file in wanted if (file.path, *_version(file)) not in done]
    new = _whole_files(spec, rest, again, notes)
    return replace(new, others=new.others + others)


def _new_rows(spec: JobSpec, chain: Chain, found: Sequence[FoundFile]) -> NewRows:
    seen = {(file.path, file.size, file.version) for file in _covered(chain, with_released=False)}
    scanned = [file for file in found if (file.path, *_version(file)) not in seen]
    files = look_into(scanned, spec.input.format, prefix=spec.input.prefix or "")
    redo = spec.input.changed == "redo"
    identity = known_by(spec)
    keys = read_keys(files, id_column=identity["id"], columns=identity["columns"])
    numbers = same_rows(keys)
    first = one_of_each(numbers, np.ones(len(keys), np.bool_), last=False)
    search = Search(keys.take(first))
    for link in chain.effective:
        for done in chain.keys_of(link):
            search.see(done)
    known, content = (np.empty_like(found) for found in (search.known, search.content))
    known[numbers[first]], content[numbers[first]] = search.known, search.content
    changed = known[numbers] & (content[numbers] != keys.content) & redo
    # With `redo` the last of those that aren't known as they are: a copy of what is done says nothing.
    chosen = one_of_each(numbers, ~known[numbers] | changed, last=redo)
    wanted = keys.take(chosen)
    notes = []
    if repeated := len(keys) - len(first):
        which = "last" if redo else "first"
        notes.append(f"{repeated:,} rows have the {spec.input.new_by} of another one beside them; the {which} counts")
    picked, picks, renumbered = _pick(files, wanted)
    paths = {file.path for file in picked}
    others = tuple(file for file in scanned if file.path not in paths)
    return NewRows(
        Source(picked, picks), len(wanted), int(changed[chosen].sum()), others, renumbered, notes=tuple(notes)
    )


def _pick(files: Sequence[InputFile], wanted: Keys) -> tuple[tuple[InputFile, ...], tuple[bytes | None, ...], Keys]:
    """The files that have wanted rows, which rows, and the keys with the files' new numbers."""
    numbers = np.unique(wanted.file_index)
    picked = tuple(files[number] for number in numbers)
    starts = np.searchsorted(wanted.file_index, numbers)
    rows = np.split(wanted.row, starts[1:]) if len(numbers) else []
    picks = tuple(
        None if len(mine) == file.num_rows else row_picks.pack(mine, file.num_rows)
        for mine, file in zip(rows, picked, strict=True)
    )
    renumbered = np.searchsorted(numbers, wanted.file_index).astype(np.int32)
    return picked, picks if any(picks) else (), replace(wanted, file_index=renumbered)


def _whole_files(spec: JobSpec, wanted: Sequence[FoundFile], again: set[str], notes: Iterable[str]) -> NewRows:
    files = look_into(wanted, spec.input.format, prefix=spec.input.prefix or "")
    changed_rows = sum(file.num_rows for file in files if file.path in again)
    filled = tuple(file for file in files if file.num_rows)
    empty = {file.path for file in files if not file.num_rows}
    others = tuple(file for file in wanted if file.path in empty)
    num_rows = sum(file.num_rows for file in filled)
    return NewRows(Source(filled), num_rows, changed_rows, others, notes=tuple(notes))


def _covered(chain: Chain, *, with_released: bool = True) -> Iterator[ClaimedFile]:
    """Files that some run did to the last row, oldest run first."""
    for link in chain.effective:
        if link.released is None:
            yield from link.claim.files
        elif with_released:
            yield from (link.claim.files[position] for position in link.released.whole_files)


def _covered_days(chain: Chain, key: str) -> tuple[dict[date, set[tuple[str, int, str]]], set[tuple[str, int, str]]]:
    """Days that were done whole, with their files then; and files that were done of days that weren't."""
    days: dict[date, set[tuple[str, int, str]]] = {}
    single: set[tuple[str, int, str]] = set()
    for link in chain.effective:
        whole = _whole(link.claim, link.released.whole_files if link.released else None)
        for day, files in by_day(link.claim.files, key).items():
            seen = {(file.path, file.size, file.version) for file in files}
            if seen <= whole:
                days[day] = seen
            else:
                single |= seen & whole
    return days, single


def _whole(claim: Claim, positions: Sequence[int] | None) -> set[tuple[str, int, str]]:
    files = claim.files if positions is None else [claim.files[position] for position in positions]
    return {(file.path, file.size, file.version) for file in files}


def _version(file: FoundFile) -> tuple[int, str]:
    return file.size, file.version


def _left(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return (
        f"{len(names):,} {what} changed since they were done and are left as they are: "
        f"{', '.join(names[:_SHOWN])}{more}; `input.changed: redo` does them again"
    )
