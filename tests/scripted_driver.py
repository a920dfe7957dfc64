"""The command line with scripted engines: `python -m tests.scripted_driver CONFIG.json run SPEC ...`.

Everything is `tramontane`'s own (parsing, signals, messages, exit codes) but the pools, which CONFIG.json describes:
{"replicas": 1, ...fields of ScriptedConfig}. Tests start, interrupt and kill it as a user's shell would.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import jobs.run
from cluster.fleet import PoolPlan
from jobs.cli import main
from pipeline.engine import MoeShape
from tests.scripted_engine import ScriptedConfig


def scripted_pools(fields: dict[str, Any]) -> list[PoolPlan]:
    """The pools that a CONFIG.json describes; every field of ScriptedConfig but `faults`, whose keys aren't text."""
    replicas = fields.pop("replicas", 1)
    config = ScriptedConfig(**{**fields, "moe": MoeShape(*fields["moe"])})
    return [PoolPlan("scripted", replicas, config, max_num_seqs=config.max_num_seqs)]


if __name__ == "__main__":
    # A test runner started in the background ignores SIGINT, and children inherit that; a user's shell doesn't.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(sys.argv.pop(1)) as file:
        pools = scripted_pools(json.load(file))
    jobs.run.pool_plans = lambda *_, **__: pools
    main()
