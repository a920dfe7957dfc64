from __future__ import annotations

import io
import os
import random
import signal
import uuid
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import pyarrow.parquet as pq
import pytest

from pipeline.counters import RunCounters, merge_all
from tests.driver_processes import wait_until
from tests.faults.crash_points import FINISHED, run_and_die
from tests.faults.forkserver import aws_environment
from tests.faults.mini_run import expected_rows, expected_totals
from tests.part_watcher import PartWatcher, part_names, read_part_file

NUM_SEEDS = 25
DEADLINE_S = 60
DEATHS = (137, -signal.SIGKILL)


@pytest.fixture(params=["local", "s3"])
def new_root(request: pytest.FixtureRequest) -> Callable[[], str]:
    if request.param == "local":
        folder = request.getfixturevalue("tmp_path")
        return lambda: str(folder / uuid.uuid4().hex)
    bucket = request.getfixturevalue("s3_bucket")
    return lambda: f"s3://{bucket}/{uuid.uuid4().hex}"


def watcher(root: str) -> PartWatcher:
    return PartWatcher(root, interval_s=0.003)


def check_output(root: str) -> None:
    files = [read_part_file(root, name) for name in part_names(root)]
    rows = [row for data in files for row in pq.read_table(io.BytesIO(data)).to_pylist()]
    assert sorted(rows, key=lambda row: (row["input_file"], row["input_row"])) == expected_rows()
    footers = [pq.read_metadata(io.BytesIO(data)).metadata[b"tramontane.counters"] for data in files]
    assert merge_all(RunCounters.from_json_bytes(footer) for footer in footers) == expected_totals()
    leftovers = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names if ".tmp" in name]
    # The lease's own are kept for an hour: they may be those of somebody who is about to claim the output.
    assert [path for path in leftovers if "/lease/" not in path] == []


class Campaign:
    """Runs that die where they are told to."""

    def __init__(self, processes: ForkServerContext) -> None:
        self._processes = processes
        self.reads = 0

    def run(self, root: str, die_at: int | None, seed: int) -> tuple[int | None, int]:
        """Return (exit code, points passed if it ended by itself)."""
        passed = self._processes.Value("i", -1)
        child = self._processes.Process(target=run_and_die, args=(aws_environment(), root, die_at, seed, passed))
        child.start()
        child.join(DEADLINE_S)
        assert child.exitcode is not None, f"run on {root} hangs"
        return child.exitcode, passed.value

    def crash_and_finish(self, root: str, die_at: int, seed: int) -> bool:
        """Crash at the point, for most seeds once more somewhere, then finish; whether the first run died."""
        draw = random.Random(f"{seed}-{die_at}")
        with watcher(root) as reader:
            first, _ = self.run(root, die_at, seed)
            second, _ = self.run(root, draw.randrange(die_at + 20), seed + 1) if draw.random() < 0.6 else (FINISHED, 0)
            last, _ = self.run(root, None, seed)
        assert reader.problems == []
        self.reads += reader.num_reads
        # A run may die; it may not fail, not even when the reply to a request is lost.
        assert {first, second} <= {FINISHED, *DEATHS}
        assert last == FINISHED
        check_output(root)
        return first != FINISHED


def count_points(campaign: Campaign, new_root: Callable[[], str]) -> int:
    root = new_root()
    code, points = campaign.run(root, None, 0)
    assert code == FINISHED
    check_output(root)
    return points


def test_run_killed_at_sampled_points_of_the_commit_protocol_resumes_exactly(
    processes: ForkServerContext, new_root: Callable[[], str]
) -> None:
    campaign = Campaign(processes)
    points = count_points(campaign, new_root)
    sample = random.Random(20).sample(range(points), 8 if new_root().startswith("s3") else 24)
    died = [campaign.crash_and_finish(new_root(), point, seed) for seed, point in enumerate(sample)]
    assert campaign.reads > 0
    assert sum(died) >= len(sample) / 2  # on S3 a third of the points lose a reply, which nobody dies of


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_run_killed_at_every_point_of_the_commit_protocol_resumes_exactly(
    processes: ForkServerContext, new_root: Callable[[], str], seed: int
) -> None:
    campaign = Campaign(processes)
    points = range(count_points(campaign, new_root))
    assert len(points) >= 20
    died = [campaign.crash_and_finish(new_root(), point, seed) for point in points]
    assert campaign.reads > 0
    assert sum(died) >= len(points) / 2


def test_part_damaged_on_purpose_is_noticed_by_the_checker(
    processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = str(tmp_path_factory.mktemp("damaged"))
    assert Campaign(processes).run(root, None, 0)[0] == FINISHED
    check_output(root)
    victim = os.path.join(root, "data", min(os.listdir(os.path.join(root, "data"))))
    os.truncate(victim, os.path.getsize(victim) - 1)
    with pytest.raises(Exception, match="Parquet"):
        check_output(root)


def test_reader_notices_a_partial_part(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = str(tmp_path_factory.mktemp("partial"))
    os.mkdir(os.path.join(root, "data"))
    with watcher(root) as reader:
        with open(os.path.join(root, "data", "part-00000-000000000000.parquet"), "wb") as file:
            file.write(b"PAR1 and no more")
        wait_until(lambda: bool(reader.problems), "the reader meets it")
