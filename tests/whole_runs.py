"""Whole runs for tests: specs over small inputs, scripted or real engines, and a checker that reads outputs only."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cluster.fleet import start_fleet
from cluster.pools import PoolPlan
from jobs.prepare import PreparedJob, prepare
from jobs.run import RunOptions, run_job
from jobs.spec import parse_spec
from jobs.synthesis import run_synthesis
from pipeline.counters import RunCounters
from pipeline.engine import MoeShape
from pipeline.parts import read_footer
from pipeline.recount import check_part
from pipeline.storage import Store
from tests.scripted_engine import ScriptedConfig

TINY_MOE = MoeShape(num_layers=4, num_experts=8, top_k=2)


def write_prompts(path: Path, rows: int, **columns: list[Any]) -> Path:
    """A Parquet file with `id` and `text`, and whatever else."""
    table = {"id": [f"row-{n}" for n in range(rows)], "text": [f"question number {n}" for n in range(rows)], **columns}
    pq.write_table(pa.table(table), path)
    return path


def spec_text(input_path: str | Path, output: str | Path, /, **sections: dict[str, Any]) -> str:
    """A spec that asks `{{ text }}` greedily; `sections` are laid over it."""
    spec: dict[str, dict[str, Any]] = {
        "model": {"source": "random", "dtype": "float32", "max_model_len": 512},
        "input": {"path": str(input_path)},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"temperature": 0, "max_tokens": 6, "seed": 1},
        "output": {"path": str(output)},
        "limits": {"hang_timeout_s": 60, "drain_timeout_s": 20},
    }
    for name, fields in sections.items():
        spec[name] = fields if name == "prompt" else {**spec.get(name, {}), **fields}
    return yaml.safe_dump({"name": "test", **spec})


def make_job(input_path: str | Path, output: str | Path, /, **sections: dict[str, Any]) -> PreparedJob:
    return prepare(parse_spec(spec_text(input_path, output, **sections), name="test.yaml"))


def run_scripted(
    job: PreparedJob,
    config: ScriptedConfig | None = None,
    *,
    replicas: int = 1,
    said: list[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run with scripted engines; the model's files still decide tokens. What it says to people is added to `said`.

    Without a config, in a Ray that is there, the engine is one that all such runs share: each start takes 3 s.
    """
    import ray

    fleet = _shared_fleet() if config is None and replicas == 1 and ray.is_initialized() else None
    config = config or ScriptedConfig(moe=TINY_MOE)
    pools = [PoolPlan("scripted", replicas, config, max_num_seqs=config.max_num_seqs)]
    say = [].append if said is None else said.append
    run = run_job if job.spec.synthesize is None else run_synthesis
    return run(job, RunOptions(quiet=True, **options), say=say, pools=pools, fleet=fleet)


_fleets: dict[str, Any] = {}


def _shared_fleet() -> Any:
    import ray

    address = ray.get_runtime_context().gcs_address
    if address not in _fleets:
        config = ScriptedConfig(moe=TINY_MOE)
        _fleets[address] = start_fleet([PoolPlan("scripted", 1, config, max_num_seqs=config.max_num_seqs)])
    return _fleets[address]


def token_of(word: str) -> int:
    """The id of a word that is a single token: what a fault of the scripted engine is tied to."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    ids = MistralTokenizer.v1().instruct_tokenizer.tokenizer.encode(f"a {word}", bos=False, eos=False)
    return int(ids[1])


def journaling(folder: Path) -> ScriptedConfig:
    """Engines that note every row they start, for `num_started`."""
    folder.mkdir()
    return ScriptedConfig(moe=TINY_MOE, journal=str(folder))


def num_started(journal: Path) -> int:
    """Rows that engines began, over all processes there were."""
    return sum(log.read_text().count("\n") for log in journal.iterdir())


def unfinished_run(folder: Path) -> Path:
    """150 rows in three parts, done to `folder/out`, and then the second part lost; returns the input."""
    rows = write_prompts(folder / "in.parquet", 150)
    run_scripted(make_job(rows, folder / "out"))
    sorted((folder / "out" / "data").iterdir())[1].unlink()
    return rows


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Everything below the folder: path -> when it changed last, and its bytes unless it is a folder."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def prompt_ids(job: PreparedJob, path: Path) -> list[list[int]]:
    """Token ids of each row of an input file, as the job's engines get them."""
    from pipeline.inputs import list_inputs
    from pipeline.read import read_shard
    from pipeline.rows import PROMPT_IDS
    from pipeline.shards import Shard
    from pipeline.templating import TemplateStage
    from pipeline.user_schema import user_schema

    [file] = list_inputs(str(path))
    table = read_shard(file, Shard(0, 0, file.path, 0, file.num_rows), user_schema([file], required=["text"]))
    stage = TemplateStage(job.template)
    ids: list[list[int]] = stage(table).column(PROMPT_IDS).to_pylist()
    stage.close()
    return ids


def read_output(output: str | Path) -> pa.Table:
    """All output rows, by identity."""
    store = Store(str(output))
    parts = sorted(store.list("data"))
    tables = [pq.read_table(store.open(f"data/{name}")) for name in parts]
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    keys = [("input_file", "ascending"), ("input_row", "ascending"), ("sample_index", "ascending")]
    position = table.schema.get_field_index("input_file")
    return table.set_column(position, "input_file", table["input_file"].cast(pa.string())).sort_by(keys)


def results(output: str | Path) -> dict[tuple[str, int, int], tuple[Any, ...]]:
    """What an undisturbed run must equal: identity -> status, text, tokens, routing; times and attempts left out."""
    table = read_output(output)
    columns = ["status", "generated_text", "num_input_tokens", "num_generated_tokens", "routing"]
    identity = zip(*(table[name].to_pylist() for name in ("input_file", "input_row", "sample_index")), strict=True)
    values = zip(*(map(_frozen, table[name].to_pylist()) for name in columns), strict=True)
    found = Counter(identity_ := list(identity))
    assert max(found.values(), default=1) == 1, "a row came out twice"
    return dict(zip(identity_, values, strict=True))


def check_whole(output: str | Path, num_rows: int) -> RunCounters:
    """Every row is there once, footers say what rows say, and the summary says what footers say; returns the totals."""
    store = Store(str(output))
    table = read_output(output)
    rows = set(zip(table["input_file"].to_pylist(), table["input_row"].to_pylist(), strict=True))
    assert len(rows) == num_rows
    totals = RunCounters()
    for name in store.list("data"):
        counters = RunCounters.from_json_bytes(read_footer(store, name).counters)
        assert check_part(counters, pq.read_table(store.open(f"data/{name}"))) == []
        totals.update(counters)
    summary = json.loads(store.read("summary.json"))
    assert summary["counts"]["committed_rows"] == summary["counts"]["input_rows"] == num_rows
    assert sum(summary["counts"][status] for status in ("ok", "truncated", "invalid", "failed")) == table.num_rows
    assert summary["tokens"]["generated"] == sum(filter(None, table["num_generated_tokens"].to_pylist()))
    return totals


def errors(output: str | Path) -> dict[int, tuple[str, int]]:
    """input_row -> (error.kind, error.attempts) of the failed rows."""
    table = read_output(output)
    return {
        row: (error["kind"], error["attempts"])
        for row, error in zip(table["input_row"].to_pylist(), table["error"].to_pylist(), strict=True)
        if error is not None
    }


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list):
        return tuple(value)
    return value
