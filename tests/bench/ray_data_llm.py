"""`ray.data.llm` on the same rows, tuned as its documentation says: a fixed pool, and twice `max_num_seqs` in flight.

python -m tests.bench.ray_data_llm SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BATCH_SIZE = 16


def main() -> None:
    """Read, generate and write."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.init(address="local", num_cpus=settings["num_cpus"], include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    engine_args = settings["engine_args"]
    config = vLLMEngineProcessorConfig(
        model_source=settings["model"],
        engine_kwargs=engine_args,
        accelerator_type=None,
        concurrency=(1, 1),
        batch_size=BATCH_SIZE,
        max_concurrent_batches=max(8, 2 * engine_args["max_num_seqs"] // BATCH_SIZE),
        runtime_env={"env_vars": settings["env"]},
        log_engine_metrics=False,
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
    )
    processor = build_processor(config, preprocess=_request, postprocess=_result)
    rows = ray.data.read_parquet(settings["input"], columns=["id", "messages", "max_tokens"])
    processor(rows.repartition(target_num_rows_per_block=BATCH_SIZE)).write_parquet(settings["output"])


def _request(row: dict[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_tokens": int(row["max_tokens"])}
    return {"id": row["id"], "messages": list(row["messages"]), "sampling_params": sampling}


def _result(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("id", "generated_text", "num_generated_tokens")}


if __name__ == "__main__":
    main()
