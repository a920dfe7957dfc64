"""How far a run is: computed from figures, shown live on a terminal or as a line every 30 s, and kept in a file.

Knows nothing of Ray. `tramontane status` shows the same from the file alone.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Self

from pipeline.monitor import Figures
from pipeline.storage import Store

logger = logging.getLogger(__name__)

PROGRESS = "_run/progress.json"
LINE_INTERVAL_S = 30.0
FILE_INTERVAL_S = 2.0
REMOTE_FILE_INTERVAL_S = 15.0
RATE_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Progress:
    """One look at a run."""

    run_id: str
    state: str
    """`starting`, `running`, `draining` or `ended`."""
    rows_total: int
    rows_done: int
    """Committed before this execution, plus finished in it."""
    rows_failed: int
    rows_in_flight: int
    replicas_up: int
    replicas_wanted: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    rows_per_s: float
    eta_s: float | None
    elapsed_s: float
    updated_at: float

    def line(self) -> str:
        """One line for people."""
        share = self.rows_done / self.rows_total if self.rows_total else 1.0
        eta = "ETA -" if self.eta_s is None else f"ETA {duration(self.eta_s)}"
        return (
            f"{self.state:<8} {self.rows_done:,} of {self.rows_total:,} rows ({math.floor(100 * share)}%) | "
            f"failed {self.rows_failed:,} | "
            f"tokens/s in {self.input_tokens_per_s:,.0f} out {self.output_tokens_per_s:,.0f} | "
            f"replicas {self.replicas_up}/{self.replicas_wanted} | {eta}"
        )


class ProgressTracker:
    """Turns snapshots of figures into rates and an estimate of the time left."""

    def __init__(
        self, *, run_id: str, rows_total: int, rows_before: int, failed_before: int, replicas_wanted: int
    ) -> None:
        self._run_id = run_id
        self._rows_total = rows_total
        self._rows_before = rows_before
        self._failed_before = failed_before
        self.replicas_wanted = replicas_wanted
        """May change: a fleet follows the work that is left."""
        self._started = time.monotonic()
        self._history: deque[tuple[float, Figures]] = deque()

    def look(self, figures: Figures, state: str, *, now: float | None = None) -> Progress:
        """Combine the newest figures with those of the last minute."""
        now = time.monotonic() if now is None else now
        if figures.rows_done or figures.rows_in_flight:
            self._history.append((now, figures))
        while len(self._history) > 2 and now - self._history[0][0] > RATE_WINDOW_S:
            self._history.popleft()
        rows, tokens_in, tokens_out = self._rates(now)
        done = min(self._rows_total, self._rows_before + figures.rows_done)
        left = self._rows_total - done
        return Progress(
            run_id=self._run_id,
            state=state,
            rows_total=self._rows_total,
            rows_done=done,
            rows_failed=self._failed_before + figures.rows_failed,
            rows_in_flight=figures.rows_in_flight,
            replicas_up=figures.replicas_up,
            replicas_wanted=self.replicas_wanted,
            input_tokens_per_s=tokens_in,
            output_tokens_per_s=tokens_out,
            rows_per_s=rows,
            eta_s=left / rows if rows > 0 else None,
            elapsed_s=now - self._started,
            updated_at=time.time(),
        )

    def _rates(self, now: float) -> tuple[float, float, float]:
        if not self._history:
            return 0.0, 0.0, 0.0
        first_at, first = self._history[0]
        last = self._history[-1][1]
        span = now - first_at
        if span <= 0:
            return 0.0, 0.0, 0.0
        return (
            (last.rows_done - first.rows_done) / span,
            (last.input_tokens - first.input_tokens) / span,
            (last.generated_tokens - first.generated_tokens) / span,
        )


class ProgressDisplay:
    """Shows progress on standard error and keeps it in the output; a context manager."""

    def __init__(self, store: Store | None, *, quiet: bool = False) -> None:
        self._store = store
        self._quiet = quiet
        self._live: Any = None
        self._next_line = time.monotonic() + LINE_INTERVAL_S
        self._next_file = 0.0

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live("", console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line above whatever is live."""
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)  # noqa: T201  the program's own output

    def show(self, progress: Progress, *, final: bool = False) -> None:
        """Update whatever is due."""
        now = time.monotonic()
        if self._live is not None:
            self._live.update(progress.line())
        elif not self._quiet and now >= self._next_line:
            self._next_line = now + LINE_INTERVAL_S
            print(progress.line(), file=sys.stderr, flush=True)  # noqa: T201  the program's own output
        if self._store is not None and (final or now >= self._next_file):
            self._next_file = now + (FILE_INTERVAL_S if self._store.is_local else REMOTE_FILE_INTERVAL_S)
            try:
                self._store.put(PROGRESS, json.dumps(asdict(progress), indent=1).encode())
            except OSError as error:  # a full disk stops the run where a part can't be committed, not here
                logger.warning("progress could not be written: %s", error)


def duration(seconds: float) -> str:
    """Short human duration: 42 s, 3 min 10 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
