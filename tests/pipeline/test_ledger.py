from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.errors import InfrastructureError, SpecError
from pipeline.lease import acquire_lease
from pipeline.ledger import FINGERPRINT, PLAN, Ledger
from pipeline.parts import commit_part, encode_part, read_part
from pipeline.resume import Decision
from pipeline.shards import Plan
from pipeline.storage import Store
from tests.faults.mini_run import FIELDS, counters_of, expected_totals, part_of, rows_of, small_plan


def opened(store: Store, plan: Plan | None = None) -> Ledger:
    ledger = Ledger(store)
    ledger.open_run(plan or small_plan(), FIELDS, resume="if_possible")
    return ledger


def commit(store: Store, *indices: int) -> None:
    for index in indices:
        shard = small_plan().shard(index)
        commit_part(store, shard.part_name, part_of(shard))


def test_todo_is_what_data_does_not_hold(store: Store) -> None:
    ledger = opened(store)
    assert ledger.todo() == [0, 1, 2, 3]
    commit(store, 2, 0)
    assert ledger.todo() == [1, 3]


def test_reopened_run_reports_what_is_committed_and_keeps_the_fingerprint(store: Store) -> None:
    assert Ledger(store).open_run(small_plan(), FIELDS, resume="if_possible").decision is Decision.FRESH
    commit(store, 1)
    again = Ledger(store).open_run(small_plan(), FIELDS, resume="always")
    assert (again.decision, again.num_committed) == (Decision.RESUME, 1)
    assert Ledger(store).fingerprint() == FIELDS


def test_stored_plan_is_used_though_this_run_would_cut_otherwise(store: Store) -> None:
    opened(store, small_plan(rows_per_shard=3))
    again = Ledger(store).open_run(small_plan(rows_per_shard=1), FIELDS, resume="if_possible")
    assert again.plan == small_plan(rows_per_shard=3)


def test_totals_of_all_parts_come_from_footers(store: Store) -> None:
    ledger = opened(store)
    commit(store, 0, 1, 2, 3)
    assert ledger.totals() == expected_totals()


def test_totals_count_committed_parts_only(local: Store) -> None:
    ledger = opened(local)
    commit(local, 3)
    assert ledger.totals() == counters_of(rows_of(small_plan().shard(3)))


def test_failed_parts_are_found_by_status_and_by_kind(local: Store) -> None:
    ledger = opened(local)
    commit(local, 0, 1, 2, 3)
    assert set(ledger.failed_parts()) == {0, 2}  # row 1 of each file
    assert set(ledger.failed_parts(kinds={"engine_hang"})) == {0, 2}
    assert ledger.failed_parts(kinds={"prompt_too_long"}) == {}
    assert set(ledger.failed_parts(statuses={"ok"})) == {0, 1, 2, 3}
    assert ledger.failed_parts()[0].part_name == small_plan().shard(0).part_name


def test_changed_field_is_refused_and_nothing_is_touched(local: Store) -> None:
    opened(local)
    commit(local, 0)
    before = (local.read(PLAN), local.read(FINGERPRINT))
    with pytest.raises(SpecError, match=r'prompt.template: "{{ text }}" -> "other"'):
        Ledger(local).open_run(small_plan(), {**FIELDS, "prompt.template": '"other"'}, resume="if_possible")
    assert (local.read(PLAN), local.read(FINGERPRINT)) == before


@pytest.mark.parametrize("begun", [False, True])
def test_foreign_file_in_data_is_refused_by_name(local: Store, begun: bool) -> None:
    if begun:
        opened(local)
    local.put("data/theirs.parquet", b"x")
    with pytest.raises(SpecError, match=r"theirs\.parquet"):
        opened(local)


def test_parts_of_a_lost_plan_are_refused_unless_a_new_plan_knows_them(local: Store) -> None:
    opened(local)
    commit(local, 0)
    local.delete(PLAN)
    with pytest.raises(SpecError, match="do not belong"):
        opened(local, dataclasses.replace(small_plan(), files=small_plan().files[1:]))
    assert opened(local).todo() == [1, 2, 3]


def test_crash_between_fingerprint_and_plan_is_continued(local: Store) -> None:
    opened(local)
    local.delete(PLAN)
    assert Ledger(local).open_run(small_plan(), FIELDS, resume="if_possible").decision is Decision.RESUME


OTHER = {**FIELDS, "prompt.template": '"other"'}


def test_a_job_that_committed_nothing_makes_way_for_another_with_its_own_plan(store: Store) -> None:
    opened(store, small_plan(rows_per_shard=3))
    other = small_plan(rows_per_shard=1)
    begun = Ledger(store).open_run(other, OTHER, resume="if_possible")
    assert (begun.decision, begun.plan) == (Decision.REPLACE, other)
    assert (Ledger(store).fingerprint(), Ledger(store).plan) == (OTHER, other)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_crash_while_a_job_makes_way_is_continued_by_either(local: Store, steps: int) -> None:
    fields = OTHER if steps == 3 else FIELDS  # delete the plan, delete the fingerprint, create the new one
    for again in (FIELDS, OTHER):
        opened(local)
        local.delete(PLAN)
        local.delete(FINGERPRINT)
        if steps != 2:
            local.create(FINGERPRINT, json.dumps({"fields": fields}).encode())
        Ledger(local).open_run(small_plan(), again, resume="if_possible")
        assert (Ledger(local).fingerprint(), Ledger(local).plan) == (again, small_plan())
        local.delete(PLAN)
        local.delete(FINGERPRINT)


def test_a_part_that_the_replaced_job_commits_late_is_refused_by_its_fingerprint(local: Store) -> None:
    opened(local)
    ledger = Ledger(local)
    ledger.open_run(small_plan(), OTHER, resume="if_possible")
    commit(local, 0)
    with pytest.raises(InfrastructureError, match="made by a different job"):
        Ledger(local).totals()


def test_run_without_rows_has_nothing_to_do(local: Store) -> None:
    ledger = opened(local, Plan((), 64))
    assert (ledger.todo(), ledger.totals().totals.num_rows) == ([], 0)


def test_output_without_a_run_is_a_spec_error_for_readers(local: Store) -> None:
    with pytest.raises(SpecError, match="holds no run"):
        Ledger(local).todo()


@pytest.mark.parametrize("name", [PLAN, FINGERPRINT])
def test_damaged_record_is_named(local: Store, name: str) -> None:
    opened(local)
    local.put(name, b"{")
    with pytest.raises(InfrastructureError, match=name):
        opened(local)


def test_part_of_another_job_under_a_planned_name_is_refused(local: Store) -> None:
    ledger = opened(local)
    shard = small_plan().shard(0)
    commit_part(local, shard.part_name, part_of(shard))
    table = read_part(local, shard.part_name)
    commit_part(local, shard.part_name, encode_part(table, b"{}", {"fingerprint": "0123456789abcdef"}))
    with pytest.raises(InfrastructureError, match=f"{shard.part_name}.*different job"):
        ledger.totals()


def test_events_are_kept_in_order_across_owners(local: Store) -> None:
    for run in ("one", "two"):
        with acquire_lease(local, run_id=run) as lease:
            ledger = Ledger(local, lease=lease)
            ledger.record_event("started", run=run)
            ledger.record_event("finished", run=run)
    told = [(event["epoch"], event["run"], event["kind"]) for event in Ledger(local).events()]
    assert told == [(1, "one", "started"), (1, "one", "finished"), (2, "two", "started"), (2, "two", "finished")]


def test_owner_that_lost_the_output_starts_nothing(local: Store) -> None:
    lease = acquire_lease(local, run_id="one")
    lease.release()
    with pytest.raises(InfrastructureError):
        Ledger(local, lease=lease).open_run(small_plan(), FIELDS, resume="if_possible")
    assert local.list("_run") == {}


def test_half_written_files_of_dead_writers_are_swept_at_the_start(local: Store, tmp_path: Path) -> None:
    opened(local)
    commit(local, 0)
    for folder in (tmp_path, tmp_path / "data", tmp_path / "_run"):
        (folder / ".x.0123456789abcdef0123456789abcdef.tmp").write_bytes(b"half")
    opened(local)
    assert list(tmp_path.rglob("*.tmp")) == []


def test_fingerprint_is_readable_json_for_people(local: Store) -> None:
    opened(local)
    assert json.loads(local.read(FINGERPRINT))["fields"] == FIELDS
