"""Files for Airflow and Dagster that run a command by the clock. Pure.

Guarantees:
- values stand in them as Python literals, so that none can become code.
- exit codes 1 and 2 end a run there for good; any other but 0 is tried again.
"""

from __future__ import annotations

from pprint import pformat

from jobs.cron import Schedule
from jobs.schedule_texts import NUM_RETRIES, RETRY_PAUSE_S, TICK, Command


def airflow(command: Command, schedule: Schedule) -> dict[str, str]:
    """A DAG of one task, for Airflow 2.9 and 3."""
    return {f"{_identifier(command.name)}_dag.py": _filled(_AIRFLOW, command, schedule)}


def dagster(command: Command, schedule: Schedule) -> dict[str, str]:
    """Definitions of one job and its schedule."""
    return {f"{_identifier(command.name)}_dagster.py": _filled(_DAGSTER, command, schedule)}


def _identifier(name: str) -> str:
    """A name for Python and for file names of modules."""
    text = "".join(character if character.isascii() and character.isalnum() else "_" for character in name)
    return f"job_{text}" if text[0].isdigit() else text


def _filled(template: str, command: Command, schedule: Schedule) -> str:
    """The template with each `|@NAME@|` replaced, once, whatever the value looks like."""
    values = {
        "@NAME@": repr(command.name),
        "@ID@": repr(_identifier(command.name)),
        "@COMMAND@": pformat([command.program, *command.arguments], width=100),
        "@FOLDER@": repr(command.folder),
        "@CRON@": repr(schedule.cron),
        "@TIMEZONE@": repr(schedule.timezone),
        "@TICK@": repr(TICK),
        "@RETRIES@": repr(NUM_RETRIES),
        "@PAUSE@": repr(RETRY_PAUSE_S),
    }
    return "".join(values.get(part, part) for part in template.split("|"))


_RUN = '''
def run(tick: str) -> int:
    """Run the command to its end and return its exit code; it ends with this process, its shards finished."""
    process = subprocess.Popen([word.replace(|@TICK@|, tick) for word in COMMAND], cwd=|@FOLDER@|)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
'''

_AIRFLOW = (
    '''"""Tramontane job |@NAME@|, by the clock. Put this file into Airflow's DAG folder (Airflow 2.9 or 3).

The worker that runs it needs the program and the spec at the paths below. One run at a time; exit code 3
(infrastructure) is tried again, 1 (too many rows failed) and 2 (wrong spec, or output in use) are not.
"""

import subprocess
from datetime import datetime, timedelta, timezone

from airflow.timetables.trigger import CronTriggerTimetable

try:
    from airflow.sdk import dag, task
    from airflow.sdk.exceptions import AirflowException, AirflowFailException
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.exceptions import AirflowException, AirflowFailException

COMMAND = |@COMMAND@|

'''
    + _RUN
    + """

@dag(
    dag_id=|@ID@|,
    schedule=CronTriggerTimetable(|@CRON@|, timezone=|@TIMEZONE@|),
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
    max_active_runs=1,
)
def tramontane_job():
    @task(retries=|@RETRIES@|, retry_delay=timedelta(seconds=|@PAUSE@|))
    def tramontane(logical_date=None):
        due = logical_date or datetime.now(timezone.utc)
        code = run(due.astimezone(timezone.utc).strftime("%Y-%m-%dT%H%MZ"))
        if code in (1, 2):
            raise AirflowFailException(f"exit code {code}: another try would end the same way")
        if code:
            raise AirflowException(f"exit code {code}: safe to try again")

    tramontane()


tramontane_job()
"""
)

_DAGSTER = (
    '''"""Tramontane job |@NAME@|, by the clock: `dagster dev -f` this file.

The machine that runs it needs the program and the spec at the paths below. One run at a time; exit code 3
(infrastructure) is tried again, 1 (too many rows failed) and 2 (wrong spec, or output in use) are not.
"""

import subprocess
from datetime import timezone

from dagster import (
    Config,
    DagsterRunStatus,
    Definitions,
    Failure,
    RetryRequested,
    RunRequest,
    RunsFilter,
    SkipReason,
    job,
    op,
    schedule,
)

NAME = |@ID@|
COMMAND = |@COMMAND@|
LIVE = [DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED]

'''
    + _RUN
    + """

class Due(Config):
    tick: str


@op(name="tramontane")
def tramontane(config: Due):
    code = run(config.tick)
    if code in (1, 2):
        raise Failure(description=f"exit code {code}: another try would end the same way", allow_retries=False)
    if code:
        raise RetryRequested(max_retries=|@RETRIES@|, seconds_to_wait=|@PAUSE@|)


@job(name=NAME)
def tramontane_job():
    tramontane()


@schedule(
    job=tramontane_job,
    name=f"{NAME}_schedule",
    cron_schedule=|@CRON@|,
    execution_timezone=|@TIMEZONE@|,
)
def tramontane_schedule(context):
    if context.instance.get_runs(RunsFilter(job_name=NAME, statuses=LIVE), limit=1):
        return SkipReason("the last run is still going on")
    tick = context.scheduled_execution_time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H%MZ")
    return RunRequest(run_key=tick, run_config={"ops": {"tramontane": {"config": {"tick": tick}}}})


defs = Definitions(jobs=[tramontane_job], schedules=[tramontane_schedule])
"""
)
