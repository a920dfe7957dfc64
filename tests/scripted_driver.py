"""The command line with scripted engines: `python -m tests.scripted_driver CONFIG.json run SPEC ...`.

Everything is `tramontane`'s own (parsing, signals, messages, exit codes) but the pools, which CONFIG.json describes:
{"replicas": 1, "gpu": "L4" (none by default), ...fields of ScriptedConfig}. Tests start, interrupt and kill it as a
user's shell would.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import jobs.run
from cluster.pools import PoolPlan, SlotShape
from jobs.engines import Engines
from jobs.main import main
from jobs.prepare import PreparedJob
from pipeline.engine import MoeShape
from tests.scripted_engine import ScriptedConfig


def scripted_pools(fields: dict[str, Any]) -> list[PoolPlan]:
    """The pools that a CONFIG.json describes, whose keys are text, those of `faults` too."""
    replicas = fields.pop("replicas", 1)
    gpu = fields.pop("gpu", None)
    shape = SlotShape(num_gpus=1, gpu_type=gpu, gpu_labels=(gpu,)) if gpu else SlotShape()
    faults = {int(token): action for token, action in fields.pop("faults", {}).items()}
    config = ScriptedConfig(**{**fields, "moe": MoeShape(*fields["moe"])}, faults=faults)
    return [PoolPlan("scripted", replicas, config, max_num_seqs=config.max_num_seqs, shape=shape)]


if __name__ == "__main__":
    # A test runner started in the background ignores SIGINT, and children inherit that; a user's shell doesn't.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(sys.argv.pop(1)) as file:
        pools = scripted_pools(json.load(file))
    engines_of = jobs.run.engines_of

    def scripted_engines(job: PreparedJob, **options: Any) -> Engines:
        """The scripted pools, unless the job attaches to a warm fleet."""
        return engines_of(job, **{**options, "pools": None if job.spec.fleet.attach else pools})

    jobs.run.engines_of = scripted_engines
    main()
