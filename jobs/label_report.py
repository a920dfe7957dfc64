"""What a labelling run found: how often each label, how sure, and under `review/` the rows that a person should see.

Read from the committed parts at the run's end, of most of them two columns only. `review/` mirrors `data/`, part by
part, so that doing it again changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.labels import CONFIDENCE, LABEL
from pipeline.multi_labels import LABELS
from pipeline.parts import open_part, part_sizes, read_part
from pipeline.settings import LabelSettings
from pipeline.storage import Store

REVIEW = "review"
_PART_THREADS = 8  # object stores answer a part's requests one after the other, so waiting is most of it


@dataclass(slots=True)
class _Found:
    num_rows: int = 0
    """That have a label, or null for being unsure."""
    labels: Counter[str] = field(default_factory=Counter)
    num_unlabelled: int = 0
    """Rows that have none: unsure ones, and with `multi` those that nothing fits."""
    confidence: float = 0.0
    """Sum over labelled rows."""
    num_unsure: int = 0
    num_to_review: int = 0


def report_labels(store: Store, settings: LabelSettings) -> dict[str, Any]:
    """Count the labels of all committed rows, and write those to review; returns the `labels` entry of the summary.

    Rows that failed have no label and are not counted.
    """
    sizes = part_sizes(store)
    reviewed = store.list(REVIEW).keys() & sizes.keys()  # other files there are somebody's own
    with ThreadPoolExecutor(_PART_THREADS, thread_name_prefix="labels") as pool:
        found = list(pool.map(lambda name: _look(store, name, sizes[name], settings), sorted(sizes)))
    to_review = {name for name, part in zip(sorted(sizes), found, strict=True) if part.num_to_review}
    for name in reviewed - to_review:
        store.delete(f"{REVIEW}/{name}")
    labels = sum((part.labels for part in found), Counter[str]())
    num_rows = sum(part.num_rows for part in found)
    return {
        "rows": num_rows,
        "counts": {label: labels[label] for label in sorted(labels)},
        "unlabelled": sum(part.num_unlabelled for part in found),
        "abstained": sum(part.num_unsure for part in found),
        "mean_confidence": sum(part.confidence for part in found) / num_rows if num_rows else None,
        "review_below": settings.review_below,
        "to_review": sum(part.num_to_review for part in found),
    }


def label_lines(labels: dict[str, Any]) -> list[str]:
    """The same for people."""
    if not labels["rows"]:
        return []
    counts = Counter(labels["counts"]).most_common(8)
    shares = ", ".join(f"{label} {count / labels['rows']:.0%}" for label, count in counts)
    more = f", {len(labels['counts']) - 8} more" if len(labels["counts"]) > 8 else ""
    lines = [f"  labels    {shares}{more}; mean confidence {labels['mean_confidence']:.2f}"]
    if labels["abstained"]:
        lines.append(f"  unsure    {labels['abstained']:,} rows are below label.abstain_below")
    if labels["to_review"]:
        lines.append(f"  review    {labels['to_review']:,} rows -> {REVIEW}/*.parquet")
    return lines


def _look(store: Store, name: str, size: int, settings: LabelSettings) -> _Found:
    table = open_part(store, name, size=size).read([LABELS if settings.multi else LABEL, CONFIDENCE])
    confidence = table[CONFIDENCE]
    labelled = table.filter(pc.is_valid(confidence))
    given = [given_labels(value) for value in labelled[0].to_pylist()]
    found = _Found(len(given), Counter(label for labels in given for label in labels))
    found.num_unlabelled = sum(not labels for labels in given)
    found.confidence = pc.sum(confidence).as_py() or 0.0
    found.num_unsure = _num_below(confidence, settings.abstain_below)
    if settings.review_below is not None:
        found.num_to_review = _num_below(confidence, settings.review_below)
        if found.num_to_review:
            rows = read_part(store, name)
            unsure = rows.filter(pc.less(rows[CONFIDENCE], settings.review_below))
            with store.writing(f"{REVIEW}/{name}") as file:
                pq.write_table(unsure, file, compression="zstd")
    return found


def label_column(names: Sequence[str]) -> str:
    """Which of a labelling run's columns says the label, or with `multi` the labels: it lies before the confidence.

    By its name it could be one of the user's, who may carry true labels along.
    """
    return names[names.index(CONFIDENCE) - 1]


def given_labels(value: str | list[str] | None) -> list[str]:
    """The labels of a row, from its `label` or its `labels`."""
    return [] if value is None else [value] if isinstance(value, str) else value


def _num_below(confidence: pa.ChunkedArray, threshold: float) -> int:
    return int(pc.sum(pc.less(confidence, threshold)).as_py() or 0)
