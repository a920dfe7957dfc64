"""`schedule`: times are cron's, texts are what their schedulers take, and exit codes decide on another try."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.cron import Schedule, is_skipped, parse_schedule, tick_name
from jobs.schedule import Wish, schedule_files, schedule_notes
from jobs.schedule_python import airflow, dagster
from jobs.schedule_texts import Command, calendar_events, crontab, systemd
from pipeline.errors import SpecError
from tests.cluster.test_manifests import EXAMPLES, SCHEMAS, close
from tests.whole_runs import spec_text

PARIS = "Europe/Paris"
NIGHTLY = parse_schedule("0 2 * * *", PARIS)
NASTY = ["plain", "", "two words", "it's", '"quoted"', "$HOME `id` $(id)", "100 % of\\%", "{tick}-a;b&c|d", "é*?[a]~#!"]
JOB = EXAMPLES / "job.yaml"
FLEET = EXAMPLES / "fleet.yaml"


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# Times


@pytest.mark.parametrize(
    ("cron", "zone", "after", "expected"),
    [
        ("0 2 * * *", "Etc/UTC", "2026-11-21T02:00", ["2026-11-22T02:00", "2026-11-23T02:00"]),
        ("0 2 * * *", PARIS, "2026-11-21T00:59", ["2026-11-21T01:00", "2026-11-22T01:00"]),
        # Clocks skip 02:00 to 03:00 on 28 March 2027: made up for at 03:00.
        ("30 2 * * *", PARIS, "2027-03-27T00:00", ["2027-03-27T01:30", "2027-03-28T01:00", "2027-03-29T00:30"]),
        # And show it twice on 31 October: once.
        ("30 2 * * *", PARIS, "2027-10-30T12:00", ["2027-10-31T00:30", "2027-11-01T01:30"]),
        ("0 * * * *", PARIS, "2027-10-30T23:30", [f"2027-10-31T0{hour}:00" for hour in range(4)]),
        ("0 0 1 * MON", "Etc/UTC", "2026-11-21T00:00", ["2026-11-23T00:00", "2026-11-30T00:00", "2026-12-01T00:00"]),
        ("0 0 29 2 *", "Etc/UTC", "2026-11-21T00:00", ["2028-02-29T00:00"]),
    ],
)
def test_next_times_are_crons_on_days_of_changing_clocks_too(
    cron: str, zone: str, after: str, expected: list[str]
) -> None:
    found = parse_schedule(cron, zone).next_times(utc(after), len(expected))
    assert [time.astimezone(UTC) for time in found] == [utc(text) for text in expected]


@pytest.mark.parametrize("cron", ["0 2 * * *", "30 2 * * *", "*/7 1-3 * * SUN", "0 0 1 * MON", "15 */5 * * *"])
def test_the_last_time_is_the_one_after_which_there_is_none_until_now(cron: str) -> None:
    schedule = parse_schedule(cron, PARIS)
    for start in ("2027-03-26T12:00", "2027-10-29T12:00", "2026-11-21T00:00"):
        now = utc(start)
        for _ in range(60):
            now += timedelta(minutes=97)
            latest = schedule.latest(now)
            assert latest <= now
            assert schedule.next_times(latest, 1)[0] > now


def test_another_try_hours_later_means_the_same_run() -> None:
    names = {
        tick_name(NIGHTLY.latest(utc(now))) for now in ("2026-11-21T01:00", "2026-11-21T03:10", "2026-11-22T00:59")
    }
    assert names == {"2026-11-21T0100Z"}


def test_times_that_clocks_skip_or_repeat_are_pointed_out() -> None:
    [spring, autumn] = NIGHTLY.clock_changes(utc("2027-01-01T00:00"))
    assert (spring.date().isoformat(), is_skipped(spring)) == ("2027-03-28", True)
    assert (autumn.date().isoformat(), is_skipped(autumn)) == ("2027-10-31", False)
    assert parse_schedule("0 4 * * *", PARIS).clock_changes(utc("2027-01-01T00:00")) == []
    assert parse_schedule("0 2 * * *", "Etc/UTC").clock_changes(utc("2027-01-01T00:00")) == []
    notes = "\n".join(schedule_notes(NIGHTLY, utc("2027-03-26T12:00")))
    assert "Sat 2027-03-27 02:00 CET (UTC+0100)" in notes
    assert notes.count("2027-03-") == 5 + 1
    assert "2027-03-28 02:00 doesn't exist in Europe/Paris" in notes


@pytest.mark.parametrize(
    ("cron", "zone", "message"),
    [
        ("0 2 * *", PARIS, "give five fields"),
        ("@daily", PARIS, "@daily aren't understood everywhere"),
        ("0 2 L * *", PARIS, "give five fields"),
        ("0 2 * * MON#2", PARIS, "give five fields"),
        ("0 25 * * *", PARIS, "Bad hour"),
        ("0 2 30 2 *", PARIS, "Bad day-of-month"),
        ("0 2 * * 7", PARIS, "write Sunday as 0"),
        ("0 2 * * *\n* * * * * id", PARIS, "give five fields"),
        ("0 2 * * *", "Paris", "'Paris' is no IANA time zone"),
        ("0 2 * * *", "../etc/passwd", "is no IANA time zone"),
        ("0 2 * * *", "Europe/Paris\nX", "is no IANA time zone"),
        ("0 2 * * *", "", "is no IANA time zone"),
    ],
)
def test_a_schedule_that_not_every_scheduler_understands_is_refused(cron: str, zone: str, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        parse_schedule(cron, zone)


# What a shell makes of it


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A program that notes its arguments and folder, and ends with the next number in `codes`, at last with 0."""
    program = tmp_path / "odd 'name' $x %d"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys\nhere = pathlib.Path({str(tmp_path)!r})\n"
        "with open(here / 'calls', 'a') as file: print(json.dumps([os.getcwd(), *sys.argv[1:]]), file=file)\n"
        "codes = here / 'codes'\nleft = codes.read_text().split() if codes.exists() else []\n"
        "codes.write_text(' '.join(left[1:]))\nsys.exit(int(left[0]) if left else 0)\n"
    )
    program.chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sleep").write_text(f"#!/bin/sh\necho slept $1 >> {shlex.quote(str(tmp_path / 'slept'))}\n")
    (tmp_path / "bin" / "sleep").chmod(0o755)
    return program


def command_for(program: Path, folder: Path, arguments: list[str]) -> Command:
    return Command("nightly", str(program), arguments, str(folder), 30)


def run_as_cron(text: str, home: Path) -> int:
    """What cron does: five fields, then a shell command, in which `\\%` is a percent sign and `%` the end."""
    line = text.splitlines()[-1]
    match = re.fullmatch(r"(\S+ ){5}(.*)", line)
    assert match is not None
    assert not re.search(r"(?<!\\)%", match[2])
    environment = {"HOME": str(home), "PATH": f"{home / 'bin'}:/usr/bin:/bin", "SHELL": "/bin/sh"}
    return subprocess.run(["/bin/sh", "-c", match[2].replace("\\%", "%")], check=False, env=environment).returncode


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock of util-linux")
def test_crontab_line_hands_every_argument_on_as_it_is(recorder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder, 100% $odd"
    folder.mkdir()
    text = crontab(command_for(recorder, folder, NASTY), NIGHTLY)["crontab"]
    assert text.splitlines()[-2] == "CRON_TZ=Europe/Paris"
    assert run_as_cron(text, tmp_path) == 0
    assert calls(tmp_path) == [[str(folder), "tick", "--timezone", PARIS, "0 2 * * *", *NASTY]]


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock of util-linux")
@pytest.mark.parametrize(
    ("codes", "code", "tries"),
    [("0", 0, 1), ("1", 1, 1), ("2", 2, 1), ("130", 130, 1), ("3 0", 0, 2), ("3 1 0", 1, 2), ("3 3 3 0", 3, 3)],
)
def test_crontab_line_tries_again_after_exit_code_3_only(
    recorder: Path, tmp_path: Path, codes: str, code: int, tries: int
) -> None:
    (tmp_path / "codes").write_text(codes)
    text = crontab(command_for(recorder, tmp_path, ["run"]), NIGHTLY)["crontab"]
    assert run_as_cron(text, tmp_path) == code
    assert len(calls(tmp_path)) == tries
    slept = (tmp_path / "slept").read_text().splitlines() if (tmp_path / "slept").exists() else []
    assert len(slept) == (tries if codes.startswith("3 3 3") else tries - 1)


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock of util-linux")
def test_crontab_line_starts_nothing_while_a_run_goes_on(recorder: Path, tmp_path: Path) -> None:
    import fcntl

    text = crontab(command_for(recorder, tmp_path, ["run"]), NIGHTLY)["crontab"]
    with (tmp_path / ".tramontane-nightly.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_as_cron(text, tmp_path) == 2
    assert not (tmp_path / "calls").exists()


def test_a_line_break_in_a_path_is_refused() -> None:
    for text in (crontab, systemd):
        with pytest.raises(SpecError, match="line break"):
            text(Command("nightly", "tramontane", ["run", "a\nb.yaml"], "/", 30), NIGHTLY)


# systemd


def systemd_words(line: str) -> list[str]:
    """Words of an Exec line, as systemd.service(5) reads them: quotes, then specifiers and variables."""
    quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', line)
    unescaped = [re.sub(r"\\(.)", r"\1", word) for word in quoted]
    assert not any(re.search(r"(?<!%)%(?!%)", word.replace("%%", "")) for word in unescaped)
    return [word.replace("%%", "%").replace("$$", "$") for word in unescaped]


def test_systemd_hands_every_argument_on_as_it_is() -> None:
    words = ["/opt/odd $x %d/tramontane", *[word for word in NASTY if word]]
    service = systemd(Command("nightly", words[0], words[1:], "/srv/100% jobs", 30), NIGHTLY)[
        "tramontane-nightly.service"
    ]
    [line] = [line for line in service.splitlines() if line.startswith("ExecStart=")]
    assert systemd_words(line) == [words[0], "tick", "--timezone", PARIS, "0 2 * * *", *words[1:]]
    assert "WorkingDirectory=/srv/100%% jobs\n" in service
    assert "RestartPreventExitStatus=1 2 130\n" in service
    assert "StartLimitBurst=3\n" in service
    often = systemd(Command("nightly", words[0], [], "/srv", 30), parse_schedule("*/5 * * * *", PARIS))
    assert "StartLimitBurst=6\n" in often["tramontane-nightly.service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_its_units(tmp_path: Path) -> None:
    units = systemd(Command("nightly", "/bin/true", ["run", *NASTY], str(tmp_path), 30), NIGHTLY)
    for name, text in units.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        check=False,
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if "nightly" in line]
    assert said == []
    # And that it would have said something.
    (tmp_path / "tramontane-nightly.timer").write_text(units["tramontane-nightly.timer"].replace("*-*-*", "*-x-*"))
    wrong = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "tramontane-nightly.timer")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "Failed to parse calendar" in wrong.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize(
    "cron",
    ["0 2 * * *", "*/20 1-3,22 * * *", "5 4 */10 JAN-MAR,12 *", "0 0 * * SAT,0", "30 6 1,15 * TUE", "0 0 */2 * 1-5"],
)
def test_systemd_is_due_when_cron_is(cron: str) -> None:
    schedule = parse_schedule(cron, "America/New_York")
    after = utc("2026-11-21T00:00")
    found: set[datetime] = set()
    for event in calendar_events(schedule):
        command = ["systemd-analyze", "calendar", "--base-time", "2026-11-21 00:00:00 UTC", "--iterations=12", event]
        shown = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "TZ": "UTC"}
        ).stdout
        times = re.findall(r"(?:Next elapse|Iter\. #\d+): \w+ (\S+ \S+) UTC", shown)
        found |= {utc(text.replace(" ", "T")) for text in times}
    assert sorted(found)[:12] == [time.astimezone(UTC) for time in schedule.next_times(after, 12)]


# Airflow and Dagster: neither is installed, so what they offer stands in for them


class Recorded(Exception):
    pass


def load(source: str, modules: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    scope: dict[str, Any] = {"__name__": "loaded"}
    exec(compile(source, "generated.py", "exec"), scope)
    return scope


def load_airflow(source: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The DAG file's names, and what it told Airflow."""
    told: dict[str, Any] = {}

    def dag(**options: Any) -> Any:
        told.update(options)
        return lambda function: function

    def task(**options: Any) -> Any:
        def decorate(function: Any) -> Any:
            told["task"] = (options, function)
            return lambda: None

        return decorate

    errors = {name: type(name, (Recorded,), {}) for name in ("AirflowException", "AirflowFailException")}
    timetable = {"CronTriggerTimetable": lambda cron, timezone: (cron, timezone)}
    modules = {
        "airflow": {},
        "airflow.sdk.exceptions": errors,
        "airflow.timetables": {},
        "airflow.timetables.trigger": timetable,
        "airflow.sdk": {"dag": dag, "task": task},
    }
    return load(source, modules, monkeypatch), told


@pytest.mark.parametrize(("codes", "raised"), [("0", None), ("1", "Fail"), ("2", "Fail"), ("3", ""), ("130", "")])
def test_airflow_task_fails_for_good_or_is_tried_again_by_exit_code(
    recorder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: str, raised: str | None
) -> None:
    (tmp_path / "codes").write_text(codes)
    [(name, source)] = airflow(command_for(recorder, tmp_path, NASTY), NIGHTLY).items()
    assert name == "nightly_dag.py"
    _, told = load_airflow(source, monkeypatch)
    assert (told["schedule"], told["max_active_runs"], told["catchup"]) == (("0 2 * * *", PARIS), 1, False)
    options, run = told["task"]
    assert options["retries"] == 2
    try:
        run(logical_date=datetime(2026, 11, 21, 2, tzinfo=NIGHTLY.zone))
        ended = None
    except Recorded as error:
        ended = type(error).__name__
    assert ended == (None if raised is None else f"Airflow{raised}Exception")
    assert calls(tmp_path) == [[str(tmp_path), *(word.replace("{tick}", "2026-11-21T0100Z") for word in NASTY)]]


def test_airflow_task_that_is_killed_takes_its_command_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(open('ended', 'w').close()))\n"
    command = Command(
        "nightly", sys.executable, ["-c", f"{script}open('up', 'w').close()\ntime.sleep(60)"], str(tmp_path), 1
    )
    [source] = airflow(command, NIGHTLY).values()
    scope, _ = load_airflow(source, monkeypatch)

    class Popen(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            while not (tmp_path / "up").exists():
                pass
            if not (tmp_path / "told").exists():
                (tmp_path / "told").touch()
                raise Recorded
            return super().wait(timeout)

    monkeypatch.setattr(scope["subprocess"], "Popen", Popen)
    with pytest.raises(Recorded):
        scope["run"]("2026-11-21T0100Z")
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("codes", "raised"), [("0", None), ("1", "Failure"), ("2", "Failure"), ("3", "RetryRequested")]
)
def test_dagster_op_fails_for_good_or_is_tried_again_by_exit_code(
    recorder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: str, raised: str | None
) -> None:
    (tmp_path / "codes").write_text(codes)
    told: dict[str, Any] = {}

    def decorator(kind: str) -> Any:
        return lambda **options: (
            lambda function: told.setdefault(kind, (options, function))[1] if kind != "job" else function
        )

    def error(name: str) -> Any:
        return type(name, (Recorded,), {"__init__": lambda self, **options: vars(self).update(options)})

    members: dict[str, Any] = {name: decorator(name) for name in ("op", "job", "schedule")}
    members |= {name: error(name) for name in ("Failure", "RetryRequested")}
    members |= {"Config": object, "DagsterRunStatus": types.SimpleNamespace(**dict.fromkeys(STATUSES, 1))}
    members |= {name: (lambda **options: options) for name in ("Definitions", "RunRequest", "RunsFilter")}
    members["SkipReason"] = lambda text: text
    [source] = dagster(command_for(recorder, tmp_path, NASTY), NIGHTLY).values()
    load(source, {"dagster": members}, monkeypatch)
    options, plan = told["schedule"]
    assert (options["cron_schedule"], options["execution_timezone"]) == ("0 2 * * *", PARIS)
    instance = types.SimpleNamespace(get_runs=lambda filters, limit: [])
    context = types.SimpleNamespace(instance=instance, scheduled_execution_time=datetime(2026, 11, 21, 1, tzinfo=UTC))
    request = plan(context)
    assert request["run_key"] == "2026-11-21T0100Z"
    instance.get_runs = lambda filters, limit: ["a run"]
    assert plan(context) == "the last run is still going on"
    try:
        told["op"][1](types.SimpleNamespace(**request["run_config"]["ops"]["tramontane"]["config"]))
        ended = None
    except Recorded as failure:
        ended = type(failure).__name__
    assert ended == raised
    assert calls(tmp_path) == [[str(tmp_path), *(word.replace("{tick}", "2026-11-21T0100Z") for word in NASTY)]]


STATUSES = ("QUEUED", "NOT_STARTED", "STARTING", "STARTED")


# Kubernetes


def kubernetes(job: Path, schedule: Schedule = NIGHTLY, *, raycronjob: bool = False) -> list[dict[str, Any]]:
    files = schedule_files(Wish(job, schedule, "kubernetes", fleet=FLEET, raycronjob=raycronjob))
    return list(yaml.safe_load_all(files["cronjob.yaml"]))


def incremental(tmp_path: Path) -> Path:
    job = yaml.safe_load(JOB.read_text())
    job["input"]["new"] = "since_last_run"
    path = tmp_path / "incremental.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def crd(name: str) -> Any:
    if not SCHEMAS.is_dir():
        pytest.skip(f"KubeRay's CRD schemas are not in {SCHEMAS}; put {name}.yaml there")
    versions = yaml.load((SCHEMAS / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    [v1] = [version for version in versions if version["name"] == "v1"]
    schema = v1["schema"]["openAPIV3Schema"]
    close(schema)
    schema["properties"]["metadata"].pop("additionalProperties", None)
    return schema


def test_cronjob_forbids_overlap_and_its_rayjob_is_valid_to_kuberay() -> None:
    cronjob, job_map, *_ = kubernetes(JOB)
    spec = cronjob["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("0 2 * * *", PARIS, "Forbid")
    [fail] = [rule for rule in spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert fail["onExitCodes"]["values"] == [1, 2, 130]
    rayjob = yaml.safe_load(job_map["data"]["rayjob.yaml"])
    assert rayjob["spec"]["backoffLimit"] == 0
    assert "output.path='s3://example-bucket/labels/{tick}'" in rayjob["spec"]["entrypoint"]
    jsonschema.validate(rayjob, crd("rayjobs"))


def test_job_that_does_what_is_new_keeps_its_output(tmp_path: Path) -> None:
    _, job_map, *_ = kubernetes(incremental(tmp_path))
    rayjob = yaml.safe_load(job_map["data"]["rayjob.yaml"])
    assert rayjob["spec"]["entrypoint"] == "tramontane run /etc/tramontane/job.yaml"
    text = schedule_files(Wish(incremental(tmp_path), NIGHTLY, "crontab"))["crontab"]
    assert "tick" not in text.splitlines()[-1]


def test_raycronjob_is_valid_to_kuberay_and_only_for_what_is_new(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"give the job input\.new: since_last_run"):
        kubernetes(JOB, raycronjob=True)
    raycronjob, job_map = kubernetes(incremental(tmp_path), raycronjob=True)
    assert raycronjob["spec"]["timeZone"] == PARIS
    assert "since_last_run" in job_map["data"]["job.yaml"]
    jsonschema.validate(raycronjob, crd("raycronjobs"))
    raycronjob["spec"]["concurrencyPolicy"] = "Forbid"
    with pytest.raises(jsonschema.ValidationError, match="concurrencyPolicy"):
        jsonschema.validate(raycronjob, crd("raycronjobs"))


# What goes together


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"scheduler": "cron"}, "use one of kubernetes, crontab, systemd, airflow, dagster"),
        ({"scheduler": "kubernetes"}, "add --fleet FILE"),
        ({"scheduler": "kubernetes", "fleet": FLEET, "overrides": ["name=x"]}, "takes no --address, --env or --set"),
        ({"scheduler": "crontab", "fleet": FLEET}, "--fleet and --raycronjob are for --on kubernetes"),
        ({"scheduler": "crontab", "environment": ["A=b"]}, "--env is for --address"),
        ({"scheduler": "crontab", "overrides": ["sampling.temprature=0"]}, "did you mean `sampling.temperature`?"),
        (
            {"scheduler": "crontab", "address": "http://h:8265", "environment": ["HF_TOKEN=hf_abc"]},
            "--env HF_TOKEN='${env:HF_TOKEN}'",
        ),
        (
            {"scheduler": "crontab", "address": "http://h:8265", "overrides": ["output.path=out"]},
            "output.path out is relative to a folder of this machine",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_cure(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        schedule_files(Wish(JOB, NIGHTLY, **wish))


def test_with_an_address_each_try_attaches_to_the_run_that_is_there(tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text(spec_text("s3://b/in.parquet", "s3://b/out"))
    wish = Wish(spec, NIGHTLY, "systemd", ["sampling.n=1"], "http://head:8265", ["HF_TOKEN=${env:TEAM_TOKEN}"])
    service = schedule_files(wish)["tramontane-test.service"]
    [line] = [line for line in service.splitlines() if line.startswith("ExecStart=")]
    words = systemd_words(line)
    assert words[5:] == [
        *("submit", str(spec), "--address", "http://head:8265", "--attach", "--env", "HF_TOKEN=${env:TEAM_TOKEN}"),
        *("--set", "sampling.n=1", "--set", "output.path=s3://b/out/{tick}"),
    ]


def test_tick_prints_the_last_due_time_and_runs_a_command_with_it(tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "tramontane")
    (tmp_path / "job.yaml").write_text(spec_text("in.parquet", "out"))

    def tramontane(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *words], check=False, cwd=tmp_path, capture_output=True, text=True)

    due = tramontane("tick", "0 0 1 1 *")
    assert re.fullmatch(r"20\d\d-01-01T0000Z\n", due.stdout)
    name = due.stdout.strip()
    words = ["validate", "job.yaml", "--json", "--set", "output.path=out/{tick}"]
    done = tramontane("tick", "--timezone", "Etc/UTC", "0 0 1 1 *", *words)
    assert json.loads(done.stdout)["output"]["path"] == f"out/{name}"
    assert tramontane("tick", "0 0 1 1 *", "validate", "nope.yaml").returncode == 2
    assert tramontane("tick", "0 0 1 1").returncode == 2
