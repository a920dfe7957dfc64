"""The job that answers a batch: an ordinary spec over its file, on the endpoint's own fleet and model. Pure.

Nothing in it comes from a request but which of the two endpoints it is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.batch_queue import Served
from cluster.batch_records import INPUT, RUN, Created
from cluster.serve_prompts import DEFAULT_COMPLETION_TOKENS
from pipeline.openai_requests import COMPLETIONS

MAX_DRAIN_S = 30.0


def batch_spec(created: Created, folder: Path, served: Served) -> dict[str, Any]:
    """The spec as data; what requests leave open is as the endpoint has it."""
    is_raw = created.endpoint == COMPLETIONS
    max_tokens = DEFAULT_COMPLETION_TOKENS if is_raw else served.model.max_model_len
    return {
        "name": created.id,
        "model": served.model.model_dump(mode="json"),
        "input": {"path": str(folder / INPUT), "format": "openai_batch"},
        "prompt": {"marker_text": served.marker_text},
        "sampling": {"max_tokens": max_tokens, "fit": True},
        "output": {"path": str(folder / RUN)},
        "routing": {"level": "counts" if served.captures_routing else "off"},
        "limits": {
            "request_timeout_s": served.request_timeout_s,
            "drain_timeout_s": min(MAX_DRAIN_S, served.drain_timeout_s),
        },
        "fleet": {"attach": served.fleet},
    }
