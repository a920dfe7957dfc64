"""What an endpoint can be told: where it listens, who may use it, and how much of it.

Light, as `pipeline.settings`: read by the command line and written into manifests.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeSettings(Settings):
    """An OpenAI-compatible endpoint on a warm fleet."""

    host: str = "127.0.0.1"
    """Address to listen on, on the cluster's head node; any but the loopback needs `keys`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    model_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """What requests call the model; null for the fleet's name."""
    keys: str | None = None
    """File on the head node with the hashes of API keys (`tramontane key`); read again when it changes."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Per key; as many at once, refilled evenly. More are answered 429."""
    max_waiting: Annotated[int, Field(ge=0, le=100_000)] = 256
    """Samples that may wait beyond those that the engines can run at once. More are answered 503."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 4 << 20
    """Largest request body. Larger ones are answered 413."""
    body_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Longest time that a request body may take to arrive."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time from a request's arrival to the end of its answer."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    """When the endpoint ends, how long answers that have begun may take."""
    batches: Annotated[str, Field(pattern="^/")] | None = None
    """Directory on the head node for `/v1/files` and `/v1/batches`, an absolute path. It outlives the endpoint: the
    next one goes on with what isn't done. Null for neither."""
    batches_at_once: Annotated[int, Field(ge=1, le=64)] = 2
    """Batches that are run at the same time; others wait in order. Each reads and templates on the head node."""
    max_file_bytes: Annotated[int, Field(ge=1024, le=64 << 30)] = 200 << 20
    """Largest file of a batch. Larger ones are answered 413."""
    max_stored_bytes: Annotated[int, Field(ge=1024)] = 20 << 30
    """Most that each key's files may take together. Further uploads are answered 413 until some are deleted."""
    upload_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 600.0
    """Longest time that an upload may take to arrive."""
    marker_text: Literal["escape", "reject", "allow"] = "escape"
    """What to do with `[INST]` or `[/INST]` in a request's text; see the same field of a job's prompt."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK
