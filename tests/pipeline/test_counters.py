"""Laws of the mergeable counters, their bytes, and their agreement with the rows they describe."""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import tracemalloc
import zlib
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import counters as counters_module
from pipeline.counters import (
    ALL,
    MAX_SLICE_CHARS,
    NULL,
    OTHER,
    RoutingKey,
    RowTotals,
    RunCounters,
    SampleFacts,
    merge_all,
    slice_name,
)
from pipeline.engine import MoeShape
from pipeline.errors import InfrastructureError
from pipeline.recount import check_part, kept_counters, recount, recountable
from pipeline.routing import RowRouting, summarize_row
from pipeline.routing_layout import layout
from pipeline.routing_totals import RoutingTotals, pack, unpack
from pipeline.rows import ERROR_TYPE, output_schema, routing_type

MOE = MoeShape(num_layers=2, num_experts=4, top_k=2)


def random_routing(seed: int, num_prompt: int, num_generated: int, moe: MoeShape = MOE) -> RowRouting:
    scores = np.random.default_rng(seed).random((num_prompt + num_generated - 1, moe.num_layers, moe.num_experts))
    return summarize_row(np.argsort(scores, axis=-1)[..., : moe.top_k], num_prompt, num_generated, moe)


@st.composite
def samples(draw: st.DrawFn, num_prompt: int) -> SampleFacts:
    status = draw(st.sampled_from(["ok", "truncated", "invalid", "failed"]))
    kind = draw(st.sampled_from(["engine_crash", "bad_messages"])) if status in ("invalid", "failed") else None
    if status == "failed":
        return SampleFacts(status, error_kind=kind)
    generated = draw(st.integers(1, 5))
    if draw(st.integers(0, 5)) == 0:
        return SampleFacts(status, generated, kind, routing_invalid=True)
    return SampleFacts(status, generated, kind, random_routing(draw(st.integers(0, 99)), num_prompt, generated))


@st.composite
def rows(draw: st.DrawFn) -> RunCounters:
    """Counters of a few rows."""
    result = RunCounters()
    for _ in range(draw(st.integers(0, 4))):
        num_prompt = draw(st.integers(1, 5))
        result.add_row(
            draw(st.lists(samples(num_prompt), min_size=1, max_size=3)),
            num_input_tokens=num_prompt,
            num_cached_tokens=draw(st.integers(0, num_prompt)),
            moe=MOE,
            slice_name=draw(st.sampled_from([ALL, NULL, "de", "fr", "日本", "en", "pt", "it"])),
        )
    return result


LAWS = settings(max_examples=60, deadline=None)


@LAWS
@given(rows(), rows(), rows())
def test_merging_is_associative_commutative_and_has_an_identity(a, b, c) -> None:
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)
    assert a.merge(RunCounters()) == a
    assert RunCounters().merge(a) == a


@LAWS
@given(rows(), rows(), rows())
def test_merge_laws_hold_when_slices_are_folded(a, b, c) -> None:
    # Same law with room for two slices, so that nearly every example folds some.
    with patch.object(counters_module, "MAX_SLICES", 2):
        a, b, c = merge_all([a]), merge_all([b]), merge_all([c])
        assert a.merge(b).merge(c) == a.merge(b.merge(c)) == c.merge(a).merge(b)
        names = {key.slice_name for key in a.merge(b).merge(c).routing} - counters_module.RESERVED_SLICES
        assert len(names) <= 2


@LAWS
@given(rows(), rows())
def test_merging_leaves_its_operands_alone(a, b) -> None:
    before = a.to_json_bytes(), b.to_json_bytes()
    a.merge(b).merge(a)
    assert (a.to_json_bytes(), b.to_json_bytes()) == before


@LAWS
@given(rows())
def test_bytes_round_trip_exactly_and_are_plain_ascii(a) -> None:
    data = a.to_json_bytes()
    again = RunCounters.from_json_bytes(data)
    assert again == a
    assert again.to_json_bytes() == data
    assert data.isascii()


@LAWS
@given(rows(), rows())
def test_order_of_rows_does_not_change_the_bytes(a, b) -> None:
    assert a.merge(b).to_json_bytes() == b.merge(a).to_json_bytes()


def test_input_tokens_count_once_per_row_and_generated_tokens_once_per_sample() -> None:
    counters = RunCounters()
    four = [SampleFacts("ok", 3), SampleFacts("truncated", 9), SampleFacts("ok", 4), SampleFacts("ok", 5)]
    counters.add_row(four, num_input_tokens=100, num_cached_tokens=64)
    counters.add_row([SampleFacts("failed", error_kind="null_prompt")], num_input_tokens=None, num_cached_tokens=None)
    totals = counters.totals
    assert (totals.num_rows, totals.num_samples) == (2, 5)
    assert totals.samples == {"ok": 3, "truncated": 1, "failed": 1}
    assert totals.error_kinds == {"null_prompt": 1}
    assert (totals.num_input_tokens, totals.num_cached_tokens, totals.num_generated_tokens) == (100, 64, 21)


def test_refused_routing_is_counted_and_enters_no_total() -> None:
    counters = RunCounters()
    counters.add_row([SampleFacts("ok", 3, routing_invalid=True)], num_input_tokens=2, num_cached_tokens=0)
    assert counters.totals.num_routing_invalid == 1
    assert counters.routing == {}


def test_selections_of_a_run_equal_the_sum_over_its_samples() -> None:
    counters, expected = RunCounters(), np.zeros((2, 8), dtype=np.uint64)
    for seed in range(20):
        routing = random_routing(seed, 1 + seed % 5, 3)
        expected += np.stack([routing.prompt_counts, routing.completion_counts])
        counters.add_row([SampleFacts("ok", 3, routing=routing)], num_input_tokens=1, num_cached_tokens=0, moe=MOE)
    totals = counters.slices()[ALL]
    assert totals.selections.reshape(2, 8).tolist() == expected.tolist()
    assert totals.num_samples == 20
    assert int(totals.selections.sum()) == int(totals.num_tokens.sum()) * MOE.num_layers * MOE.top_k


def test_coselection_is_symmetric_and_every_token_adds_one_pair_per_layer() -> None:
    totals = RoutingTotals(MOE)
    totals.add_row(random_routing(1, 6, 5))
    matrix = totals.coselection
    assert matrix is not None
    assert np.array_equal(matrix, matrix.transpose(0, 2, 1))
    assert matrix.sum(axis=(1, 2)).tolist() == [2 * 10, 2 * 10]
    assert np.diagonal(matrix, axis1=1, axis2=2).sum() == 0
    # With top-2 an expert's pairs are its selections.
    assert np.array_equal(matrix.sum(axis=2), totals.selections.sum(axis=0))


def test_coselection_that_is_not_recorded_is_none_and_not_zero() -> None:
    assert RoutingTotals(MoeShape(48, 128, 8)).coselection is None


def test_more_than_1000_slices_fold_into_other_whatever_the_cut_into_parts() -> None:
    moe = MoeShape(1, 2, 1)
    names = [f"user-{number}" for number in range(1_200)] * 2
    random.Random(5).shuffle(names)
    routing = random_routing(0, 3, 2, moe)
    whole, parts = RunCounters(), [RunCounters() for _ in range(3)]
    for position, name in enumerate(names):
        for target in (whole, parts[position % 3]):
            facts = [SampleFacts("ok", 2, routing=routing)]
            target.add_row(facts, num_input_tokens=3, num_cached_tokens=0, moe=moe, slice_name=name)
    slices = whole.slices()
    assert len(slices) == 1_001
    assert slices[OTHER].num_samples == 400
    assert {totals.num_samples for name, totals in slices.items() if name != OTHER} == {2}
    assert merge_all(parts) == whole == merge_all(reversed(parts))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "(null)"),
        ("(null)", "'(null)'"),
        ("(other)", "'(other)'"),
        ("(all)", "'(all)'"),
        ("", ""),
        ("de", "de"),
        (3, "3"),
        (True, "True"),
        (2.5, "2.5"),
        ("\ud800", "?"),
    ],
)
def test_slice_names_are_told_apart_from_reserved_ones(value: object, name: str) -> None:
    assert slice_name(value) == name


def test_long_slice_values_are_cut_but_stay_distinct() -> None:
    one, two = slice_name("x" * 10_000), slice_name("x" * 10_001)
    assert one != two
    assert len(one) == len(two) == MAX_SLICE_CHARS


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_a_count_that_is_no_natural_number_is_refused(count: object) -> None:
    with pytest.raises(ValueError, match="not negative"):
        SampleFacts("ok", count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_input_tokens"):
        RunCounters().add_row([SampleFacts("ok")], num_input_tokens=count, num_cached_tokens=0)  # type: ignore[arg-type]


def test_an_unknown_status_and_a_row_without_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="'done' is unknown"):
        SampleFacts("done")
    with pytest.raises(ValueError, match="every row must come out"):
        RunCounters().add_row([], num_input_tokens=1, num_cached_tokens=0)


def test_counters_of_two_models_do_not_merge() -> None:
    a, b = RunCounters(moe=MOE), RunCounters(moe=MoeShape(2, 8, 2))
    with pytest.raises(ValueError, match="one run has one model"):
        a.merge(b)
    with pytest.raises(ValueError, match="no MoE shape"):
        RunCounters().add_row(
            [SampleFacts("ok", routing=random_routing(0, 2, 2))], num_input_tokens=1, num_cached_tokens=0
        )
    with pytest.raises(ValueError, match="one run has one model"):
        RoutingTotals(MoeShape(2, 8, 2)).add_row(random_routing(0, 2, 2))


def test_a_routing_counter_past_64_bits_raises_instead_of_wrapping() -> None:
    full = RoutingTotals(MOE, np.full(layout(MOE).size, 2**64 - 1, dtype=np.uint64))
    with pytest.raises(OverflowError):
        full.copy().add(full)
    assert unpack(pack([full]), 1, MOE) == [full]


def test_token_counts_beyond_64_bits_survive() -> None:
    huge = RunCounters(totals=RowTotals(num_rows=1, num_generated_tokens=2**70))
    both = merge_all([huge, huge])
    assert RunCounters.from_json_bytes(both.to_json_bytes()).totals.num_generated_tokens == 2**71


def one_part() -> RunCounters:
    counters = RunCounters()
    facts = [SampleFacts("ok", 3, routing=random_routing(1, 4, 3))]
    counters.add_row(facts, num_input_tokens=4, num_cached_tokens=0, moe=MOE)
    return counters


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"rows": -1},
        {"rows": "many"},
        {"samples": {"ok": -5}},
        {"samples": None},
        {"routing": "!!!"},
        {"routing": ""},
        {"routing": pack([RoutingTotals(MOE), RoutingTotals(MOE)])},
        {"routing_keys": [["(all)", "ok"], ["(all)", "truncated"]]},
        {"routing_keys": [["(all)", "ok"], ["(all)", "ok"]]},
        {"moe": [2, 8, 2]},
        {"moe": [2]},
    ],
)
def test_damaged_bytes_are_named_with_the_cure(change: dict[str, object]) -> None:
    record = json.loads(one_part().to_json_bytes()) | change
    with pytest.raises(InfrastructureError, match="delete that part and rerun"):
        RunCounters.from_json_bytes(json.dumps(record).encode())


def test_a_slice_told_twice_is_refused_rather_than_half_lost() -> None:
    record = json.loads(one_part().to_json_bytes())
    record |= {"routing_keys": [["(all)", "ok"]] * 2, "routing": pack([RoutingTotals(MOE), RoutingTotals(MOE)])}
    with pytest.raises(InfrastructureError, match="twice"):
        RunCounters.from_json_bytes(json.dumps(record).encode())


def test_bytes_cut_anywhere_are_refused() -> None:
    data = one_part().to_json_bytes()
    for end in range(0, len(data), 7):
        with pytest.raises(InfrastructureError):
            RunCounters.from_json_bytes(data[:end])


def test_packed_routing_without_its_checksum_is_refused() -> None:
    whole = base64.b64decode(pack([RoutingTotals(MOE)]))
    with pytest.raises(ValueError, match="cut short"):
        unpack(base64.b64encode(whole[:-4]).decode(), 1, MOE)


def test_packed_routing_is_never_inflated_beyond_what_it_should_hold() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(200_000_000), 9)).decode()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than it should"):
            unpack(bomb, 1, MOE)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_counters_survive_a_process_boundary() -> None:
    assert pickle.loads(pickle.dumps(one_part())) == one_part()


def test_a_mixtral_part_costs_a_few_kilobytes_of_footer() -> None:
    mixtral, counters = MoeShape(32, 8, 2), RunCounters()
    for seed in range(30):
        facts = [SampleFacts("ok", 30, routing=random_routing(seed, 50, 30, mixtral))]
        counters.add_row(facts, num_input_tokens=50, num_cached_tokens=0, moe=mixtral)
    assert len(counters.to_json_bytes()) < 6_000


# Output tables: what a part's rows say against what its footer says.


def output_table(seed: int, num_rows: int, *, statuses: tuple[str, ...]) -> tuple[pa.Table, RunCounters]:
    """A part in Parquet's round trip, and the counters that its writer would have put in the footer."""
    rng, footer, records = random.Random(seed), RunCounters(), []
    for row in range(num_rows):
        num_prompt = rng.randint(1, 6)
        samples = [facts_of(rng.choice(statuses), rng, num_prompt) for _ in range(rng.randint(1, 3))]
        footer.add_row(
            samples, num_input_tokens=num_prompt, num_cached_tokens=row % 2, moe=MOE, slice_name=f"s{row % 3}"
        )
        records += [record_of(row, index, num_prompt, facts) for index, facts in enumerate(samples)]
    rng.shuffle(records)
    table = pa.Table.from_pylist(records, schema=output_schema([], routing_type(MOE, tokens=False)))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=7)
    return pq.read_table(buffer), footer


def facts_of(status: str, rng: random.Random, num_prompt: int) -> SampleFacts:
    if status == "failed":
        return SampleFacts(status, error_kind="engine_crash")
    generated = rng.randint(1, 5)
    if rng.random() < 0.1:
        return SampleFacts(status, generated, routing_invalid=True)
    return SampleFacts(status, generated, routing=random_routing(rng.randint(0, 999), num_prompt, generated))


def record_of(row: int, index: int, num_prompt: int, facts: SampleFacts) -> dict[str, object]:
    error = {"kind": facts.error_kind, "message": "m", "stage": "s", "attempts": 1} if facts.error_kind else None
    routing = facts.routing and {
        "prompt_expert_counts": facts.routing.prompt_counts,
        "completion_expert_counts": facts.routing.completion_counts,
        "repeat_first": facts.routing.repeat_first,
        "repeat_any": facts.routing.repeat_any,
    }
    return {
        "input_file": f"file-{row % 2}",
        "input_row": row,
        "sample_index": index,
        "status": facts.status,
        "num_input_tokens": num_prompt,
        "num_cached_tokens": row % 2,
        "num_generated_tokens": facts.num_generated_tokens,
        "error": error,
        "routing": routing,
    }


EVERY_STATUS = ("ok", "ok", "truncated", "invalid", "failed")


@pytest.mark.parametrize("seed", range(5))
def test_recounting_a_part_from_its_rows_agrees_with_its_footer(seed: int) -> None:
    table, footer = output_table(seed, 40, statuses=EVERY_STATUS)
    assert check_part(footer, table) == []
    assert recount(table).totals == footer.totals
    assert sum(int(s.sum()) for s in recount(table).selections.values()) > 0


def test_a_footer_that_disagrees_with_its_rows_is_told_counter_by_counter() -> None:
    table, footer = output_table(1, 40, statuses=EVERY_STATUS)
    footer.totals.num_generated_tokens += 1
    key = next(key for key in footer.routing if key.statuses == "ok")
    footer.routing[key].selections[0, 0, 0] += np.uint64(1)
    told = check_part(footer, table)
    assert len(told) == 2
    assert told[0].startswith("num_generated_tokens: ")
    assert told[1].startswith("expert selections of rows that are ok: ")


def test_a_lost_row_is_noticed() -> None:
    table, footer = output_table(2, 40, statuses=EVERY_STATUS)
    assert check_part(footer, table.slice(1))


@pytest.mark.parametrize("statuses", [("ok", "failed"), EVERY_STATUS])
@pytest.mark.parametrize("retried", [{"failed"}, {"failed", "invalid"}, {"truncated"}])
def test_retry_gives_the_footer_of_a_run_that_never_failed(statuses, retried: set[str]) -> None:
    table, footer = output_table(3, 40, statuses=statuses)
    by_row: dict[int, set[str]] = {}
    for row, status in zip(table["input_row"].to_pylist(), table["status"].to_pylist(), strict=True):
        by_row.setdefault(row, set()).add(status)
    keep = [not by_row[row] & retried for row in table["input_row"].to_pylist()]
    kept = table.filter(pa.array(keep))
    base = kept_counters(footer, kept, retried_statuses=retried)
    assert check_part(base, kept) == []

    # The same rows counted afresh, from the same generator: repetition and co-selection must agree as well.
    fresh, rng = RunCounters(moe=MOE), random.Random(3)
    for row in range(40):
        num_prompt = rng.randint(1, 6)
        facts = [facts_of(rng.choice(statuses), rng, num_prompt) for _ in range(rng.randint(1, 3))]
        if not {sample.status for sample in facts} & retried:
            fresh.add_row(
                facts, num_input_tokens=num_prompt, num_cached_tokens=row % 2, moe=MOE, slice_name=f"s{row % 3}"
            )
    assert base == fresh
    base.update(fresh)
    assert footer == output_table(3, 40, statuses=statuses)[1], "the old footer was changed"


def test_retry_refuses_a_footer_that_its_rows_contradict() -> None:
    table, footer = output_table(4, 40, statuses=EVERY_STATUS)
    with pytest.raises(InfrastructureError, match="can't be carried over; delete the part and rerun"):
        kept_counters(footer, table, retried_statuses={"truncated"})


def test_a_part_with_routing_off_recounts_without_routing_or_invalid_routing() -> None:
    table, _ = output_table(5, 20, statuses=("ok", "failed"))
    index = table.schema.get_field_index("routing")
    off = table.set_column(index, pa.field("routing", pa.null()), pa.nulls(table.num_rows))
    found = recount(off)
    assert found.totals.num_routing_invalid == 0
    assert found.selections == {}
    assert found.totals.num_rows == 20


def test_a_part_without_rows_recounts_to_nothing() -> None:
    table, footer = output_table(6, 0, statuses=("ok",))
    assert check_part(footer, table) == []
    assert recount(table).totals == RowTotals()
    assert table.schema.field("error").type == ERROR_TYPE


def test_mixed_statuses_of_one_row_are_one_group() -> None:
    counters = RunCounters()
    facts = [
        SampleFacts("truncated", 2, routing=random_routing(1, 2, 2)),
        SampleFacts("ok", 2, routing=random_routing(2, 2, 2)),
    ]
    counters.add_row(facts, num_input_tokens=2, num_cached_tokens=0, moe=MOE)
    assert set(counters.routing) == {RoutingKey(ALL, "ok+truncated")}
    assert set(recountable(counters).selections) == {"ok+truncated"}
