"""Every exception of the program, in one tree that says what happens next.

    TramontaneError
    |-- RowError               this row is `failed`; its neighbours go on; never retried within a run
    |-- AttemptError           one attempt at some rows ended badly; dispatch retries them
    |   |-- RequestError         the engine failed one request
    |   |-- RequestRefused       the engine refuses one request by rule; the one attempt that isn't repeated
    |   |-- ReplicaDied          the replica's process or node is gone, with all that was in flight on it
    |   |   |-- NodeLost           with the whole node: no row is to blame
    |   |   `-- ReplicaUnreachable its process can't be reached; whether it died, and of what, isn't known yet
    |   `-- ReplicaHung          no progress for the allowed time; the replica is killed
    |-- RoutingInvalid         one sample's expert ids are impossible: nulled and counted; its text stands
    |-- ApiError               `cluster.serve_errors`: a request over HTTP gets no answer, and why
    `-- RunError               the run stops; `exit_code` says how
        |-- SpecError            2  bad spec, input or settings; nothing ran
        |   `-- UnknownJob         `jobs.ray_jobs`: the cluster has no such job
        `-- InfrastructureError  3  safe to rerun

A run that ends early on purpose (too many failed rows: 1, an interrupt: 130) is no exception; its summary says so.

Exceptions cross process boundaries: every constructor argument reaches `super().__init__`, so pickling keeps them.
"""

from __future__ import annotations

INVALID_JSON = "invalid_json"
"""`error.kind` of an invalid row: a whole sample that isn't the JSON that was asked for."""
# Every `error.kind` that a failed row can have. Names are stable: people filter by them.
ERROR_KINDS = frozenset(
    {
        *("bad_row", "null_prompt", "empty_prompt", "bad_messages", "bad_sampling", "prompt_too_long"),
        *("template_error", "template_timeout", "template_memory", "template_crash", "marker_text", "control_text"),
        *("bad_request", "unsupported_request", "duplicate_custom_id"),
        *("request_refused", "request_error", "request_timeout", "engine_crash", "engine_hang", "internal"),
    }
)
# Kinds of row errors that say nothing about the row itself: another attempt in another run may well succeed.
RETRYABLE_KINDS = frozenset({"engine_crash", "engine_hang", "request_error", "request_timeout"})


class TramontaneError(Exception):
    """Root of everything this program raises on purpose."""


class RowError(TramontaneError):
    """One row cannot be processed, and trying again would not help.

    `kind` is a stable identifier written to the `error.kind` column; `stage` is the operator that refused the row.
    """

    def __init__(self, kind: str, message: str, stage: str) -> None:
        super().__init__(kind, message, stage)
        self.kind = kind
        self.message = message
        self.stage = stage

    def __str__(self) -> str:
        return f"{self.stage}: {self.kind}: {self.message}"


class AttemptError(TramontaneError):
    """One attempt ended badly; the rows it carried may be tried again."""

    kind = "request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(AttemptError):
    """The engine failed one request; others in the same engine are unharmed."""


class RequestRefused(AttemptError):
    """The engine refuses one request by its own rules, and would again."""

    kind = "request_refused"


class ReplicaDied(AttemptError):
    """The replica's process is gone and took everything in flight with it."""

    kind = "engine_crash"


class NodeLost(ReplicaDied):
    """The replica's node is gone; what ran on it had no part in that."""

    kind = "node_lost"


class ReplicaUnreachable(ReplicaDied):
    """The connection broke, with answers that may have been on their way: nothing more can be known of its rows."""

    kind = "replica_unreachable"


class ReplicaHung(AttemptError):
    """The replica answered nothing new for the allowed time."""

    kind = "engine_hang"


class RoutingInvalid(TramontaneError):
    """The engine reported expert ids that no router can have chosen; the sample is good, its routing is not."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RunError(TramontaneError):
    """The run stops. `exit_code` is what the process exits with."""

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SpecError(RunError):
    """The spec, its input or its settings are wrong; nothing ran and nothing was spent."""

    exit_code = 2


class InfrastructureError(RunError):
    """Something under the run failed; rerunning the same command is safe."""

    exit_code = 3
