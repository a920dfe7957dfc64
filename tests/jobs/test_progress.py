"""Progress: rates of the last minute, an estimate that is never past the end, and lines that say what is so."""

from __future__ import annotations

import json
import os
import pty
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.progress import PROGRESS, Progress, ProgressDisplay, ProgressTracker, duration
from pipeline.monitor import Figures
from pipeline.storage import Store


def tracker(*, total: int = 1000, before: int = 0, failed: int = 0) -> ProgressTracker:
    return ProgressTracker(run_id="r", rows_total=total, rows_before=before, failed_before=failed, replicas_wanted=2)


def figures(rows: int, **others: Any) -> Figures:
    return Figures(rows_done=rows, rows_in_flight=others.pop("rows_in_flight", 1), **others)


def test_rates_are_those_of_the_last_minute() -> None:
    watch = tracker(total=10_000)
    for second in range(0, 200, 10):
        rate = 5 if second < 100 else 20
        rows = 5 * min(second, 100) + 20 * max(0, second - 100)
        now = watch.look(figures(rows, input_tokens=3 * rows, generated_tokens=7 * rows), "running", now=float(second))
    assert (now.rows_per_s, now.input_tokens_per_s, now.output_tokens_per_s) == pytest.approx((rate, 60, 140))
    assert now.eta_s == pytest.approx((10_000 - rows) / 20)


def test_a_stalled_run_has_no_estimate() -> None:
    watch = tracker()
    for second in range(0, 300, 10):
        now = watch.look(figures(min(100, 10 * second)), "running", now=float(second))
    assert (now.rows_per_s, now.eta_s) == (0.0, None)
    assert "ETA -" in now.line()


def test_loading_the_engine_is_not_counted_as_slowness() -> None:
    watch = tracker()
    for second in range(0, 120, 10):
        watch.look(Figures(), "starting", now=float(second))
    watch.look(figures(0), "running", now=120.0)
    assert watch.look(figures(50), "running", now=130.0).rows_per_s == pytest.approx(5.0)


def test_rows_of_earlier_executions_count_as_done_but_not_as_speed() -> None:
    watch = tracker(before=600, failed=3)
    watch.look(figures(0), "running", now=0.0)
    now = watch.look(figures(100, rows_failed=2), "running", now=10.0)
    assert (now.rows_done, now.rows_failed, now.rows_per_s) == (700, 5, 10.0)
    assert now.eta_s == pytest.approx(30.0)


@given(
    total=st.integers(0, 10_000),
    before=st.integers(0, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 3000)), max_size=20),
)
def test_no_line_ever_claims_more_than_there_is(total: int, before: int, steps: list[tuple[float, int]]) -> None:
    watch = tracker(total=total, before=min(before, total))
    clock, rows = 0.0, 0
    for seconds, more in steps:
        clock, rows = clock + seconds, rows + more  # may pass the total: attempts of rows that were done before
        now = watch.look(figures(rows), "running", now=clock)
        assert 0 <= now.rows_done <= total
        assert now.eta_s is None or now.eta_s >= 0
        shown = re.search(r"\((\d+)%\)", now.line())
        assert shown is not None
        assert int(shown[1]) <= 100
        assert (int(shown[1]) == 100) == (now.rows_done == total)


def look(**changes: Any) -> Progress:
    return Progress(**{**asdict(tracker().look(figures(1), "running", now=0.0)), **changes})


def test_the_line_says_rows_tokens_replicas_failures_and_time_left() -> None:
    shown = look(
        rows_done=2500, rows_total=10_000, rows_failed=12, output_tokens_per_s=1234.5, replicas_up=1, eta_s=190.0
    )
    assert shown.line() == (
        "running  2,500 of 10,000 rows (25%) | failed 12 | tokens/s in 0 out 1,234 | replicas 1/2 | ETA 3 min 10 s"
    )


def test_elsewhere_than_on_a_terminal_there_is_one_line_per_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with ProgressDisplay(None) as display, ProgressDisplay(None, quiet=True) as quiet:
        for second in range(100):
            clock[0] = float(second)
            display.show(look(rows_done=second))
            quiet.show(look(rows_done=second))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["30", "60", "90"]


def test_the_file_always_holds_the_final_state(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with ProgressDisplay(store, quiet=True) as display:
        for rows in range(5):
            display.show(look(rows_done=rows))
        display.show(look(rows_done=5, state="ended"), final=True)
    kept = Progress(**json.loads(store.read(PROGRESS)))
    assert (kept.rows_done, kept.state) == (5, "ended")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_on_a_terminal_there_is_one_live_line_and_what_is_said_stays_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    watch = tracker()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        with ProgressDisplay(None) as display:
            for second in range(3):
                now = watch.look(figures(100 * second), "running", now=float(second))
                display.show(now)
                time.sleep(0.3)
            display.say("a replica was lost")
            shown = ""
            while "a replica was lost\r\n" not in shown:
                shown += os.read(ours, 65536).decode()
    assert "\x1b[2K" in shown, "lines are written over"
    assert now.line() in re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert re.search(r"^(.*\x1b\[2K)?a replica was lost\r$", shown, re.MULTILINE)
