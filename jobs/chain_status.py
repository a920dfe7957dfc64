"""The runs of an incremental job and how each stands, for `status`."""

from __future__ import annotations

from typing import Any

from jobs.chain import Chain, Link
from jobs.summary import read_summary

SHOWN = 10


def describe_runs(chain: Chain) -> list[dict[str, Any]]:
    """The latest runs, oldest first, at most `SHOWN` of them."""
    return [_describe(chain, link) for link in chain.links[-SHOWN:]]


def run_lines(chain_length: int, runs: list[dict[str, Any]]) -> list[str]:
    """The same for people, with how many came before."""
    earlier = chain_length - len(runs)
    lines = [f"... and {earlier:,} earlier runs"] if earlier else []
    for each in runs:
        changed = f", {each['changed_rows']:,} of them changed" if each["changed_rows"] else ""
        lines.append(f"  {each['folder']}  {each['rows']:,} rows{changed}: {each['state']}")
    return lines


def _describe(chain: Chain, link: Link) -> dict[str, Any]:
    claim = link.claim
    facts = {"run": claim.run, "folder": claim.folder, "rows": claim.rows, "changed_rows": claim.changed_rows}
    return {**facts, "state": _state(chain, link)}


def _state(chain: Chain, link: Link) -> str:
    if link.released is not None:
        left = link.claim.rows - link.released.kept_rows
        return f"{link.released.kept_rows:,} done, {left:,} given back ({link.released.reason})"
    summary = read_summary(chain.run_store(link))
    if summary is None:
        return "not finished; `tramontane run` goes on with it"
    counts = summary["counts"]
    missing = f", {counts['missing_rows']:,} missing" if counts["missing_rows"] else ""
    return f"{summary['status']}, {counts['failed']:,} failed{missing}"
