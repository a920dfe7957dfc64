"""The DAG file in a real Airflow, by its own parser and its own run of a DAG.

Airflow pins versions that ours doesn't, so it needs a Python of its own (`pip install 'apache-airflow==3.*'`), which
TRAMONTANE_AIRFLOW_PYTHON names. tests/jobs/test_schedule.py runs the file's task everywhere, with stand-ins.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.schedule_python import airflow
from jobs.schedule_texts import Command
from tests.jobs.test_schedule import NASTY, NIGHTLY

PYTHON = os.environ.get("TRAMONTANE_AIRFLOW_PYTHON")

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(PYTHON is None, reason="TRAMONTANE_AIRFLOW_PYTHON names no Python that has Airflow"),
]

ASK = """
import json, sys
from airflow.models import DagBag
from airflow.utils.db import initdb
initdb()
bag = DagBag(sys.argv[1])
[dag] = bag.dags.values()
[task] = dag.tasks
run = dag.test()
[instance] = run.get_task_instances()
print("SEEN" + json.dumps({
    "errors": bag.import_errors, "dag": dag.dag_id, "at_once": dag.max_active_runs, "catchup": dag.catchup,
    "timetable": type(dag.timetable).__name__, "when": dag.timetable.summary, "retries": task.retries,
    "state": str(instance.state), "tries": instance.try_number,
}))
"""


def in_airflow(home: Path, *, exit_code: int) -> dict[str, Any]:
    """What Airflow makes of the file whose command ends so, and of one run of it."""
    (home / "dags").mkdir(parents=True)
    program = home / "program.py"
    program.write_text(
        f"import json, sys; json.dump(sys.argv[1:], open({str(home / 'said')!r}, 'w')); exit({exit_code})"
    )
    command = Command("nightly", sys.executable, [str(program), *NASTY], str(home), 30)
    [(name, source)] = airflow(command, NIGHTLY).items()
    assert source.count("timedelta(seconds=300)") == 1
    (home / "dags" / name).write_text(source.replace("timedelta(seconds=300)", "timedelta(seconds=0)"))
    assert PYTHON is not None
    environment = {**os.environ, "AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    asked = subprocess.run(
        [PYTHON, "-c", ASK, str(home / "dags")], check=False, env=environment, capture_output=True, text=True
    )
    found = [line for line in asked.stdout.splitlines() if line.startswith("SEEN")]
    assert found, asked.stdout + asked.stderr
    return dict(json.loads(found[0].removeprefix("SEEN")))


@pytest.mark.parametrize(
    ("exit_code", "state", "tries"), [(0, "success", 1), (1, "failed", 1), (2, "failed", 1), (3, "failed", 3)]
)
def test_airflow_reads_the_file_runs_the_command_and_tries_again_what_is_worth_it(
    tmp_path: Path, exit_code: int, state: str, tries: int
) -> None:
    seen = in_airflow(tmp_path / "airflow", exit_code=exit_code)
    assert seen["errors"] == {}
    assert (seen["dag"], seen["at_once"], seen["catchup"]) == ("nightly", 1, False)
    assert (seen["timetable"], seen["when"], seen["retries"]) == ("CronTriggerTimetable", "0 2 * * *", 2)
    assert (seen["state"], seen["tries"]) == (state, tries)
    said = json.loads((tmp_path / "airflow" / "said").read_text())
    tick = re.match(r"\d{4}-\d\d-\d\dT\d{4}Z", said[NASTY.index("{tick}-a;b&c|d")])
    assert tick
    assert said == [word.replace("{tick}", tick[0]) for word in NASTY]
