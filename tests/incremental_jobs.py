"""Incremental jobs for tests: inputs that grow night by night, runs by scripted engines, and what came out of all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cluster.pools import PoolPlan
from jobs.incremental import Command, retry_incremental, run_incremental
from jobs.run import RunOptions
from jobs.spec import parse_spec
from pipeline.storage import Store
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, read_output, spec_text


class Nightly:
    """One incremental job over the files in a folder, told apart as `source` says."""

    def __init__(
        self, input_path: str | Path, output: str | Path, /, *, choices: list[str] | None = None, **source: Any
    ) -> None:
        """With `choices` a labelling job, else one that completes."""
        self.choices = choices
        self.input, self.output = str(input_path), str(output)
        self.source = {"new": "since_last_run", "path": self.input, **source}
        self.said: list[str] = []

    def spec_text(self, **sections: Any) -> str:
        text = spec_text(self.input, self.output, **{"input": self.source, **sections})
        if self.choices is None:
            return text
        spec = {name: fields for name, fields in yaml.safe_load(text).items() if name not in ("prompt", "sampling")}
        return yaml.safe_dump(spec | {"kind": "label", "label": {"text": "text", "choices": self.choices}})

    def run(self, config: ScriptedConfig | None = None, /, *, retry: bool = False, **sections: Any) -> dict[str, Any]:
        """What `tramontane run` or `retry` does tonight."""
        return self.execute(RunOptions(quiet=True, only_failed=retry), config, **sections)

    def execute(self, options: RunOptions, config: ScriptedConfig | None = None, /, **sections: Any) -> dict[str, Any]:
        config = config or ScriptedConfig(moe=TINY_MOE)
        spec = parse_spec(self.spec_text(**sections), name="test.yaml")
        pools = [PoolPlan("scripted", 1, config, max_num_seqs=config.max_num_seqs)]
        command = Command(spec, options, self.said.append, means={"pools": pools})
        return retry_incremental(command) if options.only_failed else run_incremental(command)

    def folders(self) -> list[str]:
        """Of the runs that have parts, oldest first."""
        return sorted({path.parent.parent.name for path in Path(self.output).glob("runs/*/data/*.parquet")})

    def rows(self) -> list[dict[str, Any]]:
        """All output rows, run by run."""
        found: list[dict[str, Any]] = []
        for folder in self.folders():
            found += read_output(f"{self.output}/runs/{folder}").to_pylist()
        return found

    def times_done(self) -> Counter[str]:
        """How often each id came out, over all runs."""
        return Counter(row["id"] for row in self.rows())


def write_rows(path: Path, ids: range | list[int], *, text: str = "question number") -> Path:
    """A Parquet file with the rows of these ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"id": [f"row-{n}" for n in ids], "text": [f"{text} {n}" for n in ids]}
    pq.write_table(pa.table(table), path)
    return path


def ids(numbers: range | list[int]) -> set[str]:
    """As `write_rows` writes them."""
    return {f"row-{n}" for n in numbers}


def claims(output: str | Path) -> list[str]:
    """Names of the claims and releases in the chain."""
    return sorted(Store(str(output)).list("_chain"))
