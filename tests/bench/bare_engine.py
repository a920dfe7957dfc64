"""The bound: one `LLM.generate` call over all rows, ids given, nothing around it; results in one Parquet file.

python -m tests.bench.bare_engine SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    """Generate for every row of the settings' input."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    rows = pq.read_table(settings["input"], columns=["id", "ids", "max_tokens"])
    engine = LLM(model=settings["model"], **settings["engine_args"])
    prompts = [{"prompt_token_ids": ids} for ids in rows["ids"].to_pylist()]
    sampling = [SamplingParams(temperature=0.0, max_tokens=count) for count in rows["max_tokens"].to_pylist()]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    found = {
        "id": rows["id"],
        "generated_text": [output.outputs[0].text for output in outputs],
        "num_generated_tokens": [len(output.outputs[0].token_ids) for output in outputs],
    }
    Path(settings["output"]).mkdir(parents=True)
    pq.write_table(pa.table(found), Path(settings["output"]) / "all.parquet")


if __name__ == "__main__":
    main()
