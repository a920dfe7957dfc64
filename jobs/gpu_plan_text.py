"""A plan for GPUs as lines for people: one table, the reasons, what the job takes. Reads the report's plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.roofline import REAL_SHARE_HIGH, REAL_SHARE_LOW
from jobs.progress import duration

_INDENT = " " * 10
_COLUMNS = (
    "gpu",
    "nodes",
    "TP",
    "a node",
    "replicas",
    "weights GiB",
    "KV tokens",
    "max_num_seqs",
    "ideal tok/s",
    "expected tok/s",
)
_WIDTHS = (11, 7, 2, 6, 8, 11, 11, 12, 11, 18)


def gpu_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Lines of the report's `gpus` entry."""
    if report["pools"] or report["notes"] or report["was_looked_at"]:
        yield f"cluster   {report['cluster']}"
    for note in report["notes"]:
        yield f"note      {note}"
    for step in report["later_steps"]:
        tokens = f"{step['input_tokens']['total']:,} tokens in, {step['output_tokens']['total']:,} out"
        yield f"then      {step['step']}: {step['requests']:,} requests, {tokens}, besides retries"
    pools = report["pools"]
    if not pools:
        return
    yield f"gpus      {_row(_COLUMNS)}"
    for pool in pools:
        if pool["tensor_parallel"]:
            yield f"{_INDENT}{_row(_cells(pool))}"
    for pool in pools:
        yield f"{'why' if pool['tensor_parallel'] else 'refused':<10}{pool['gpu']}: {pool['reason']}"
        for problem in _alike(pool["refused"]):
            yield f"refused   {pool['gpu']}: {problem}"
    output = report["output_tokens"]
    yield f"expected  {output['total']:,} output tokens ({output['low']:,} to {output['high']:,}{_guess(report)})"
    if report["total"] is not None:
        yield from _takes(report["total"])
    yield (
        "figures   estimates (roofline from datasheets, of which engines reach "
        f"{REAL_SHARE_LOW:.0%} to {REAL_SHARE_HIGH:.0%}); nothing was measured, `tramontane preview -n 20` measures"
    )


def _alike(problems: Sequence[str]) -> list[str]:
    """Problems in one line where they differ in the size only: `tensor_parallel=3, 5, 7 doesn't divide ...`."""
    sizes: dict[str, list[str]] = {}
    for problem in problems:
        size, _, rest = problem.removeprefix("tensor_parallel=").partition(" ")
        sizes.setdefault(rest, []).append(size)
    return [f"tensor_parallel={', '.join(numbers)} {rest}" for rest, numbers in sizes.items()]


def _guess(report: Mapping[str, Any]) -> str:
    return "" if report["output_is_exact"] else "; a guess: half of the most there can be"


def _takes(total: Mapping[str, Any]) -> Iterator[str]:
    low, high = total["gpu_hours"]
    yield f"takes     {_amount(low)} to {_amount(high)} GPU-hours on {total['gpus']:,} GPUs, once engines are up"
    shortest, longest = (duration(seconds) for seconds in total["wall_s"])
    yield f"wall time {shortest} to {longest} ({duration(total['ideal_s'])} ideal, for the expected tokens)"
    if total["usd"] is not None:
        yield f"cost      ${total['usd'][0]:,.2f} to ${total['usd'][1]:,.2f}"
    else:
        yield "cost      unknown: set usd_per_gpu_hour of every pool"


def _cells(pool: Mapping[str, Any]) -> tuple[str, ...]:
    expected = pool["expected_tokens_per_s"]
    return (
        pool["gpu"],
        ", ".join(f"{kind['nodes']} x {kind['gpus_per_node']}" for kind in pool["nodes"]),
        str(pool["tensor_parallel"]),
        f"{pool['replicas_per_node']:,}" if pool["nodes_per_replica"] == 1 else f"1 on {pool['nodes_per_replica']}",
        f"{pool['replicas']:,}",
        f"{pool['weights_gib_per_gpu']:.1f}",
        f"{pool['kv_tokens']:,}",
        f"{pool['max_num_seqs']:,}",
        f"{pool['ideal_tokens_per_s']:,}",
        f"{expected[0]:,} to {expected[1]:,}",
    )


def _row(cells: tuple[str, ...]) -> str:
    """The first two columns left, the figures right."""
    padded = [
        f"{cell:<{width}}" if index < 2 else f"{cell:>{width}}"
        for index, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    ]
    return " ".join(padded).rstrip()


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
