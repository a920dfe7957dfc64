"""Who is measured: for each contestant the command that turns a file of rows into a folder of results.

All get the same model, the same rows and the same engine settings; each gets what its own documentation advises beside
that. The order of `NAMES` is that of the report.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

NAMES = ("bare", "ours", "ours+routing", "ray.data.llm", "run-batch")
NUM_CPUS = 8
"""Logical, for `ray.data.llm`: with fewer than its stages ask for it hangs."""
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine's core in the caller's process: on CPU as fast, with half of the processor time and 10 s less to start."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all contestants have in common."""

    model: Path
    engine_args: Mapping[str, Any]
    """As vLLM names them: dtype, max_model_len, max_num_seqs, max_num_batched_tokens and others."""
    num_threads: int
    """Of each engine's forward pass. With all cores the engine and what feeds it take them from each other; with one
    less they don't, as where the engine is on a GPU."""

    @property
    def env(self) -> dict[str, str]:
        """Environment of every engine's process."""
        return {
            "OMP_NUM_THREADS": str(self.num_threads),
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        }


@dataclass(frozen=True, slots=True)
class Command:
    """What to start, and where its results will be."""

    words: list[str]
    env: dict[str, str]
    results: Path
    """A folder of Parquet files, or of one `.jsonl` file."""


def command(name: str, bench: Bench, rows: Path, folder: Path) -> Command:
    """The command of a contestant; writes the settings that it reads into `folder`.

    Raises:
        ValueError: no such contestant.
    """
    folder.mkdir(parents=True)
    if name.startswith("ours"):
        return _ours(bench, rows, folder, level="counts" if name == "ours+routing" else "off")
    if name == "bare":
        return _module("bare_engine", bench, rows, folder, env=IN_PROCESS)
    if name == "ray.data.llm":
        return _module("ray_data_llm", bench, rows, folder, env={})
    if name == "run-batch":
        return _run_batch(bench, rows, folder)
    raise ValueError(f"no contestant {name!r}; there are {', '.join(NAMES)}")


def _ours(bench: Bench, rows: Path, folder: Path, *, level: str) -> Command:
    args = dict(bench.engine_args)
    dtype, max_model_len = args.pop("dtype"), args.pop("max_model_len")
    for ours_anyway in ("enforce_eager", "enable_chunked_prefill", "enable_prefix_caching"):
        args.pop(ours_anyway, None)
    spec = {
        "name": "bench",
        "model": {"source": str(bench.model), "dtype": dtype, "max_model_len": max_model_len, "engine_args": args},
        "input": {"path": str(rows)},
        "prompt": {"messages": "messages"},
        "sampling": {"temperature": 0, "max_tokens": 400, "column": "sampling", "dedupe": "off", "fit": True},
        "output": {"path": str(folder / "out")},
        "routing": {"level": level},
        "fleet": {"pools": [{"gpu": "cpu", "cpu_threads": bench.num_threads}]},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    words = [str(Path(sys.executable).with_name("tramontane")), "run", str(folder / "job.yaml")]
    return Command(words, {}, folder / "out" / "data")


def _module(module: str, bench: Bench, rows: Path, folder: Path, *, env: Mapping[str, str]) -> Command:
    settings = {
        "model": str(bench.model),
        "engine_args": dict(bench.engine_args),
        "input": str(rows),
        "output": str(folder / "out"),
        "num_cpus": NUM_CPUS,
        "env": bench.env,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    words = [sys.executable, "-m", f"tests.bench.{module}", str(folder / "settings.json")]
    return Command(words, {**bench.env, **env}, folder / "out")


def _run_batch(bench: Bench, rows: Path, folder: Path) -> Command:
    (folder / "out").mkdir()
    # What `vllm run-batch` starts; the command itself looks for a distribution that the CPU build has another name for.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(rows.with_suffix(".jsonl"))]
    words += ["-o", str(folder / "out" / "all.jsonl"), "--model", str(bench.model), "--served-model-name", "bench"]
    for name, value in bench.engine_args.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return Command(words, bench.env, folder / "out")


def environment(command: Command, mark: str) -> dict[str, str]:
    """The child's environment; `mark` is in that of all its processes, by which they are found."""
    return {**os.environ, **command.env, "TRAMONTANE_BENCH_RUN": mark, "PYTHONPATH": os.getcwd()}
