"""The dataset card: a README.md that tells a stranger what the rows are and how they were made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.prepare import PreparedJob


_FIRST_ANSWERS = "- config_name: first_answers\n  data_files: data/*.parquet\n"
_OF_RECORDS = "`records/` holds what became records, see `synthesis.json`. First answers, in `data/`:\n"


def dataset_card(job: PreparedJob, summary: dict[str, Any]) -> str:
    """Return the card as Markdown with YAML front matter; every value from the spec is quoted as JSON."""
    counts, tokens, model = summary["counts"], summary["tokens"], summary["model"]
    sampling = job.spec.sampling.model_dump(exclude_defaults=True)
    prompt = job.spec.prompt.model_dump(exclude_defaults=True)
    makes_records = job.spec.synthesize is not None
    folder = "records" if makes_records else "data"
    first_answers, of_records = (_FIRST_ANSWERS, _OF_RECORDS) if makes_records else ("", "")
    return f"""---
configs:
- config_name: default
  data_files: {folder}/*.parquet
{first_answers}- config_name: routing
  data_files: routing/experts.parquet
tags: [tramontane, synthetic]
---

# {job.spec.name}

{of_records}{counts["output_rows"]:,} output rows from {counts["input_rows"]:,} input rows: {counts["ok"]:,} ok,
{counts["truncated"]:,} truncated, {counts["invalid"]:,} invalid, {counts["failed"]:,} failed.
{tokens["input"]:,} input tokens, {tokens["generated"]:,} generated.

| | |
|---|---|
| model | {_code(model["source"])} |
| revision | {_code(model["revision"])} |
| architecture | {_code(model["architecture"])} |
| dtype | {_code(job.spec.model.dtype)} |
| prompt | {_code(prompt)} |
| sampling | {_code(sampling)} |
| fingerprint | {_code(summary["fingerprint"])} |

Made by Tramontane; `summary.json` has all figures. Rows are identified by
`input_file` and `input_row`; their order means nothing.
"""


def _code(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # A table cell and a code span end at these; the card is read by tools that render HTML.
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(character, entity)
    return f"<code>{text}</code>"
