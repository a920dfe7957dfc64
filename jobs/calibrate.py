"""`calibrate`: how right a labelling run was, how sure it was of it, and the temperature that makes the two agree.

Reads a finished output whose rows carry their true label in a column, and writes nothing but, if asked, a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.calibration import (
    HIGHEST,
    LOWEST,
    Bin,
    Floats,
    Indices,
    accuracy,
    choice_figures,
    expected_calibration_error,
    fit_temperature,
    reliability,
    tempered,
)
from jobs.label_report import label_column
from jobs.multi_calibration import decisions_of
from jobs.status import output_of
from pipeline.errors import SpecError
from pipeline.labels import PROBABILITIES
from pipeline.multi_labels import LABELS
from pipeline.parts import DATA, committed_parts
from pipeline.storage import Store

FEWEST_ROWS = 20
"""With fewer, a fitted temperature says more about the sample than about the labeller."""


def read_calibration(text: str, gold_column: str) -> dict[str, Any]:
    """The report on the output (or that of the spec) named so.

    Raises:
        SpecError: it is no output of a labelling run, has no such column, or too few rows with a true label.
    """
    store = Store(output_of(text))
    if _is_multi(store):
        found = decisions_of(store, _tables(store, gold_column), gold_column)
        probabilities, gold = found.as_choices()
        counts = {"rows": len(found.truth), "rows_with_another_gold_label": found.num_other, "decisions": len(gold)}
        figures, shares = found.figures(), found.shares()
    else:
        choices, probabilities, gold, num_other = _read(store, gold_column)
        counts = {"rows": len(gold), "rows_with_another_gold_label": num_other}
        figures, shares = choice_figures(probabilities, gold, choices), {"accuracy": accuracy(probabilities, gold)}
    if counts["rows"] < FEWEST_ROWS:
        what = "lists of choices" if "decisions" in counts else "one of the choices"
        raise SpecError(
            f"{counts['rows']} rows in {store.root} have both label probabilities and {what} in "
            f"{gold_column!r}; give at least {FEWEST_ROWS}"
        )
    temperature = fit_temperature(probabilities, gold)
    before, after = (reliability(each, gold) for each in (probabilities, tempered(probabilities, temperature)))
    return {
        "output": store.root,
        "gold": gold_column,
        **counts,
        **shares,
        "temperature": temperature,
        "expected_calibration_error": {
            "before": expected_calibration_error(before),
            "after": expected_calibration_error(after),
        },
        "choices": [asdict(each) for each in figures],
        "reliability": {"before": [asdict(each) for each in before], "after": [asdict(each) for each in after]},
    }


def calibration_lines(report: dict[str, Any]) -> list[str]:
    """The same for people."""
    errors = report["expected_calibration_error"]
    width = max(len("label"), *(len(each["choice"]) for each in report["choices"]))
    several = ""
    if "decisions" in report:
        decided = f"of {report['decisions']:,} decisions, a yes or no about each label"
        several = f"   ({decided}; rows with all of them right: {report['rows_all_right']:.3f})"
    lines = [
        f"{report['output']}: {report['rows']:,} rows with a true label in `{report['gold']}`",
        f"accuracy     {report['accuracy']:.3f}{several}",
        f"temperature  {report['temperature']:.3f}   (put into the spec: label.temperature, times what is there now)",
        f"calibration  expected error {errors['before']:.3f}, with that temperature {errors['after']:.3f}",
        "",
        f"{'label':{width}}  precision  recall    true  predicted",
    ]
    for each in report["choices"]:
        shares = f"{_share(each['precision'])}   {_share(each['recall'])}"
        lines.append(f"{each['choice']:{width}}      {shares}  {each['gold']:6,}  {each['predicted']:9,}")
    lines += ["", "confidence    rows  said   right     with the temperature: rows  said   right"]
    both = zip(report["reliability"]["before"], report["reliability"]["after"], strict=True)
    lines += [f"{_bin(old)}                      {_figures(new)}" for old, new in both if old["count"] or new["count"]]
    if not 1.02 * LOWEST < report["temperature"] < HIGHEST / 1.02:
        lines.append("no temperature fits: it ran to the end of its range; this confidence can't be mended")
    if other := report["rows_with_another_gold_label"]:
        lines.append(f"left out: {other:,} rows whose `{report['gold']}` is null or none of the labels")
    return lines


def reliability_svg(report: dict[str, Any]) -> str:
    """The reliability diagram: what was said against what was right, before (red) and after (blue); area is rows."""
    bars = []
    for name, colour in (("before", "#c0392b"), ("after", "#2471a3")):
        bins = [Bin(**each) for each in report["reliability"][name]]
        most = max(each.count for each in bins)
        for each in (each for each in bins if each.count):
            x, y, radius = 40 + 300 * each.confidence, 330 - 300 * each.accuracy, 2 + 8 * (each.count / most) ** 0.5
            bars.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity="0.6"/>')
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" width="380" height="380" font-family="sans-serif" font-size="12">',
            '<rect x="40" y="30" width="300" height="300" fill="none" stroke="#888"/>',
            '<line x1="40" y1="330" x2="340" y2="30" stroke="#888" stroke-dasharray="4"/>',
            *bars,
            '<text x="190" y="360" text-anchor="middle">confidence</text>',
            '<text x="15" y="180" text-anchor="middle" transform="rotate(-90 15 180)">accuracy</text>',
            '<text x="50" y="50" fill="#c0392b">as said</text>',
            '<text x="50" y="66" fill="#2471a3">with the fitted temperature</text>',
            "</svg>\n",
        ]
    )


def write_plot(path: Path, svg: str) -> None:
    """Write the picture.

    Raises:
        SpecError: nothing can be written there.
    """
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"--plot {path} can't be written: {error.strerror}; choose a file in a folder that exists"
        ) from None


def _read(store: Store, gold_column: str) -> tuple[list[str], Floats, Indices, int]:
    """The choices, and of the rows with a true label their probabilities and that label's index; how many had none."""
    choices: list[str] = []
    said: list[Floats] = []
    gold: list[int] = []
    num_other = 0
    for table in _tables(store, gold_column):
        kind = table.schema.field(PROBABILITIES).type
        choices = [kind.field(index).name for index in range(kind.num_fields)]
        index_of = {choice: index for index, choice in enumerate(choices)}
        labelled = table.filter(table.column(PROBABILITIES).is_valid())
        trues = [index_of.get(value) for value in labelled.column(gold_column).cast(pa.string()).to_pylist()]
        known = [row for row, true in enumerate(trues) if true is not None]
        rows = labelled.column(PROBABILITIES).combine_chunks()
        matrix = np.stack([rows.field(index).to_numpy() for index in range(len(choices))], axis=1)
        said.append(matrix[known])
        gold += [true for true in trues if true is not None]
        num_other += len(trues) - len(known)
    return choices, np.concatenate(said), np.array(gold, dtype=np.int64), num_other


def _is_multi(store: Store) -> bool:
    """Whether the run gave any number of labels a row."""
    parts = sorted(committed_parts(store))
    if not parts:
        raise SpecError(f"{store.root} holds no committed rows; give the output of a labelling run")
    with store.open(f"{DATA}/{parts[0]}") as file:
        names = pq.ParquetFile(file).schema_arrow.names
    return PROBABILITIES in names and label_column(names) == LABELS


def _tables(store: Store, gold_column: str) -> Iterator[pa.Table]:
    """Of each part the columns that are needed."""
    for name in sorted(committed_parts(store)):
        with store.open(f"{DATA}/{name}") as file:
            yield _columns(pq.ParquetFile(file), gold_column, store)


def _columns(file: pq.ParquetFile, gold_column: str, store: Store) -> pa.Table:
    names = file.schema_arrow.names
    if PROBABILITIES not in names:
        raise SpecError(f"{store.root} has no `{PROBABILITIES}`: it is no output of a job of `kind: label`")
    if gold_column not in names:
        mine = ", ".join(names[: names.index("input_file")]) or "none of the input's"
        raise SpecError(f"{store.root} has no column {gold_column!r} with true labels; it carries {mine}")
    return file.read(columns=[PROBABILITIES, gold_column])


def _share(value: float | None) -> str:
    return "    -" if value is None else f"{value:5.3f}"


def _bin(each: dict[str, Any]) -> str:
    return f"{each['low']:.2f}-{each['high']:.2f}  {_figures(each)}"


def _figures(each: dict[str, Any]) -> str:
    if not each["count"]:
        return f"{0:6,}     -       -"
    return f"{each['count']:6,}  {each['confidence']:.3f}  {each['accuracy']:.3f}"
