"""The template stage: every row gets ids or an error, whatever its neighbours are."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipeline.chat_encoder import MixtralV1Encoder
from pipeline.errors import SpecError
from pipeline.jinja_process import RenderLimits
from pipeline.prompts import Message
from pipeline.rows import ERROR, FILE, PROMPT_IDS, READ_ERROR, REPAIRS, ROW, SAMPLING, SHARD, prompt_fields, read_fields
from pipeline.sampling import sampling_from_json
from pipeline.settings import Example, PromptSettings, SamplingSettings
from pipeline.templating import TemplateSettings, TemplateStage, needed_columns, template_shard

GOOD = [{"role": "user", "content": "Hello"}]
GOOD_IDS = MixtralV1Encoder().encode([Message("user", "Hello")]).ids


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixtral")
    (folder / "config.json").write_text('{"model_type": "mixtral", "vocab_size": 32000}')
    return str(folder)


@pytest.fixture
def make(model_dir: str) -> Iterator[Any]:
    """Stages by prompt and sampling settings, closed at the end."""
    made: list[TemplateStage] = []

    def build(prompt: dict[str, Any], *, max_model_len: int = 2048, timeout_s: float = 2.0, **sampling: Any) -> Any:
        settings = TemplateSettings(
            prompt=PromptSettings(**prompt),
            sampling=SamplingSettings(**sampling),
            model_dir=model_dir,
            max_model_len=max_model_len,
            limits=RenderLimits(timeout_s=timeout_s),
        )
        made.append(TemplateStage(settings))
        return made[-1]

    yield build
    for stage in made:
        stage.close()


def shard(read_errors: list[str | None] | None = None, **columns: Any) -> pa.Table:
    """A table as reading makes it: the user's columns, identity, read errors."""
    table = pa.table(columns)
    count = table.num_rows
    identity = ([0] * count, ["f"] * count, list(range(count)), read_errors or [None] * count)
    for field, values in zip(read_fields(), identity, strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


def kinds(table: pa.Table) -> list[str | None]:
    return [error and error["kind"] for error in table.column(ERROR).to_pylist()]


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content} for content in contents]


def test_good_rows_get_ids_sampling_and_an_unchanged_rest(make: Any) -> None:
    table = shard(messages=[GOOD, GOOD], extra=pa.array([b"\xff", None]))
    done = make({"messages": "messages"}, max_tokens=9)(table)
    assert done.select(table.column_names).equals(table)
    assert done.column(PROMPT_IDS).to_pylist() == [GOOD_IDS, GOOD_IDS]
    assert done.column(REPAIRS).to_pylist() == [[], []]
    assert kinds(done) == [None, None]
    assert sampling_from_json(done.column(SAMPLING)[0].as_py()) == SamplingSettings(max_tokens=9)


def test_the_columns_added_are_those_of_the_row_contract_even_for_no_rows(make: Any) -> None:
    stage = make({"messages": "messages"})
    for table in (shard(messages=pa.array([], pa.string())), shard(messages=[None, "[]"]), shard(messages=[GOOD])):
        added = stage(table).schema
        assert [added.field(field.name) for field in prompt_fields()] == prompt_fields()
        assert added.names == ["messages", SHARD, FILE, ROW, READ_ERROR, PROMPT_IDS, SAMPLING, REPAIRS, ERROR]


BAD_CHATS: list[tuple[str | None, str]] = [
    (None, "null_prompt"),
    ("", "empty_prompt"),
    ("[]", "bad_messages"),
    ("nonsense", "bad_messages"),
    (json.dumps([{"role": "user", "content": ""}]), "empty_prompt"),
    (json.dumps([{"role": "tool", "content": "a"}]), "bad_messages"),
    (json.dumps([{"role": "user", "content": 1}]), "bad_messages"),
    ('[{"role": "user", "content": "\\ud800"}]', "bad_messages"),
    (json.dumps(chat("x" * (1 << 20))), "prompt_too_long"),
    (json.dumps([{"role": "assistant", "content": "a"}]), "bad_messages"),
]


def test_bad_chats_fail_alone_and_their_neighbours_are_right(make: Any) -> None:
    values = [value for bad, _ in BAD_CHATS for value in (json.dumps(GOOD), bad)]
    done = make({"messages": "m"})(shard(m=values))
    assert kinds(done) == [kind for _, bad in BAD_CHATS for kind in (None, bad)]
    assert done.column(PROMPT_IDS).to_pylist() == [GOOD_IDS, None] * len(BAD_CHATS)
    for error in done.column(ERROR).to_pylist()[1::2]:
        assert (error["stage"], error["attempts"]) == ("template", 0)
        assert 20 < len(error["message"]) <= 500


@pytest.mark.parametrize(
    "column",
    [pa.array([1, 2]), pa.array([b"x", b"y"]), pa.array([{"role": "user"}] * 2), pa.array([None, None])],
    ids=["int", "bytes", "struct", "null"],
)
def test_a_messages_column_of_another_type_fails_its_rows(make: Any, column: pa.Array) -> None:
    assert set(kinds(make({"messages": "m"})(shard(m=column)))) <= {"bad_messages", "null_prompt"}


def test_text_that_is_not_utf8_fails_its_row(make: Any) -> None:
    broken = pa.array([json.dumps(GOOD).encode(), b'"\xff"']).view(pa.string())
    assert kinds(make({"messages": "m"})(shard(m=broken))) == [None, "bad_messages"]


def test_rows_that_could_not_be_read_fail_as_bad_rows_of_the_read_stage(make: Any) -> None:
    table = shard(["line 3 is not JSON", None], x=[None, "Hello"])
    done = make({"template": "{{ x }}"})(table)
    assert kinds(done) == ["bad_row", None]
    assert done.column(ERROR)[0].as_py() == {
        "kind": "bad_row",
        "message": "line 3 is not JSON",
        "stage": "read",
        "attempts": 0,
    }
    assert done.column(PROMPT_IDS).to_pylist() == [None, GOOD_IDS]


def test_a_template_renders_columns_to_one_user_message(make: Any) -> None:
    done = make({"template": "He{{ x }}{{ n + 1 }}"})(shard(x=["llo", None, "y", " "], n=[1, 1, None, 2]))
    expected = MixtralV1Encoder().encode([Message("user", "Hello2")]).ids
    assert kinds(done) == [None, "null_prompt", "null_prompt", None]
    assert done.column(PROMPT_IDS)[0].as_py() == expected


def test_a_template_that_renders_to_nothing_is_an_empty_prompt(make: Any) -> None:
    assert kinds(make({"template": "{{ x }}"})(shard(x=["", " \n"]))) == ["empty_prompt", "empty_prompt"]


def test_a_system_template_sees_the_row(make: Any) -> None:
    stage = make({"messages": "m", "system": "Answer in {{ language }}."})
    done = stage(shard(m=[GOOD, GOOD], language=["French", None]))
    expected = MixtralV1Encoder().encode([Message("user", "Answer in French.\n\nHello")]).ids
    assert done.column(PROMPT_IDS).to_pylist() == [expected, None]
    assert kinds(done) == [None, "null_prompt"]
    assert stage.decode(expected) == "<s>[INST] Answer in French.\n\nHello [/INST]"


def test_template_and_system_and_examples_together(make: Any) -> None:
    examples = [Example(user="{{ q }}", assistant="{{ a }}")]  # literal: examples are not templates
    stage = make({"template": "{{ x }}", "system": "S {{ x }}", "examples": examples})
    done = stage(shard(x=["b"]))
    assert (
        stage.decode(done.column(PROMPT_IDS)[0].as_py())
        == "<s>[INST] S b\n\n{{ q }} [/INST] {{ a }}</s>[INST] b [/INST]"
    )


def test_a_template_in_a_row_stays_text(make: Any) -> None:
    stage = make({"template": "{{ x }}"})
    done = stage(shard(x=["{{ ''.__class__ }}"]))
    assert stage.decode(done.column(PROMPT_IDS)[0].as_py()) == "<s>[INST] {{ ''.__class__ }} [/INST]"


def test_a_row_whose_template_explodes_fails_alone(make: Any) -> None:
    template = "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}Hello"
    started = time.monotonic()
    done = make({"template": template}, timeout_s=0.5)(shard(n=[1, 99_999, 1]))
    assert time.monotonic() - started < 10
    assert kinds(done) == [None, "template_timeout", None]
    assert done.column(PROMPT_IDS).to_pylist() == [GOOD_IDS, None, GOOD_IDS]


def test_repairs_are_recorded_per_row(make: Any) -> None:
    rows = [
        [{"role": "system", "content": "s"}, *GOOD],
        chat("a", "b"),
        chat("[INST]"),
        GOOD,
    ]
    done = make({"messages": "m"})(shard(m=[json.dumps(row) for row in rows]))
    assert done.column(REPAIRS).to_pylist() == [["system_folded"], ["merged_user_turns"], ["marker_escaped"], []]


def test_marker_text_can_be_rejected(make: Any) -> None:
    stage = make({"messages": "m", "marker_text": "reject"})
    assert kinds(stage(shard(m=[chat("[/INST]"), GOOD]))) == ["marker_text", None]


def test_per_row_sampling_lays_over_the_jobs(make: Any) -> None:
    stage = make({"messages": "m"}, column="s", max_tokens=32, temperature=0.7)
    overrides = [None, '{"temperature": 0}', '{"temperature": 99}', "{", '{"max_tokens": 4}', '{"fit": true}']
    done = stage(shard(m=[GOOD] * 6, s=overrides))
    assert kinds(done) == [None, None, "bad_sampling", "bad_sampling", None, "bad_sampling"]
    settings = [text and sampling_from_json(text) for text in done.column(SAMPLING).to_pylist()]
    assert [s and (s.temperature, s.max_tokens) for s in settings] == [(0.7, 32), (0, 32), None, None, (0.7, 4), None]
    assert done.column(PROMPT_IDS)[2].as_py() is None


def test_a_sampling_column_that_holds_no_text_is_a_failed_row(make: Any) -> None:
    assert kinds(make({"messages": "m"}, column="s")(shard(m=[GOOD], s=[3]))) == ["bad_sampling"]


def test_a_prompt_must_leave_room_for_max_tokens_to_the_token(make: Any) -> None:
    room = len(GOOD_IDS) + 10
    assert kinds(make({"messages": "m"}, max_model_len=room, max_tokens=10)(shard(m=[GOOD]))) == [None]
    assert kinds(make({"messages": "m"}, max_model_len=room - 1, max_tokens=10)(shard(m=[GOOD]))) == ["prompt_too_long"]


def test_max_tokens_shrinks_to_fit_down_to_one(make: Any) -> None:
    for room, expected in ((3, 3), (1, 1), (0, None)):
        stage = make({"messages": "m"}, max_model_len=len(GOOD_IDS) + room, max_tokens=10, min_tokens=2, fit=True)
        done = stage(shard(m=[GOOD]))
        text = done.column(SAMPLING)[0].as_py()
        assert (text and sampling_from_json(text).max_tokens) == expected
        assert kinds(done) == ["prompt_too_long" if expected is None else None]
        assert text is None or sampling_from_json(text).min_tokens == min(2, expected)


def test_a_row_with_its_own_max_tokens_is_measured_by_it(make: Any) -> None:
    stage = make({"messages": "m"}, max_model_len=len(GOOD_IDS) + 10, max_tokens=500, column="s")
    assert kinds(stage(shard(m=[GOOD, GOOD], s=[None, '{"max_tokens": 10}']))) == ["prompt_too_long", None]


def test_a_prompt_of_megabytes_is_refused_without_being_tokenized(make: Any) -> None:
    stage = make({"messages": "m"})
    huge = shard(m=[json.dumps(chat("word " * (4 << 20)))])
    started = time.monotonic()
    done = stage(huge)
    assert time.monotonic() - started < 2  # 0.03 s; tokenizing 20 MiB takes 6 s
    assert done.column(ERROR)[0].as_py()["message"].startswith("the prompt has at least 1310720 tokens")


def test_the_longest_text_that_fits_is_not_refused_by_the_shortcut(make: Any) -> None:
    # 16 spaces are one token, the longest of the vocabulary: the shortcut's bound at its tightest.
    text = "x" + " " * 16 * 100 + "x"
    ids = MixtralV1Encoder().encode([Message("user", text)]).ids
    assert len(ids) < 125
    stage = make({"messages": "m"}, max_model_len=len(ids) + 1, max_tokens=1)
    assert kinds(stage(shard(m=[chat(text)]))) == [None]


def test_needed_columns_are_those_that_prompt_and_sampling_name() -> None:
    sampling = SamplingSettings(column="s")
    assert needed_columns(PromptSettings(messages="m", system="{{ a }}"), sampling) == {"m", "a", "s"}
    assert needed_columns(PromptSettings(template="{{ x }}{{ y.z }}"), SamplingSettings()) == {"x", "y"}
    with pytest.raises(SpecError):
        needed_columns(PromptSettings(template="{{ x"), sampling)


def test_an_example_that_can_never_be_encoded_is_a_spec_error(make: Any) -> None:
    with pytest.raises(SpecError, match=r"prompt.examples\[0\]"):
        make({"messages": "m", "marker_text": "reject", "examples": [Example(user="[INST]", assistant="b")]})


def test_template_shard_keeps_its_stage_between_shards_and_changes_it_with_the_settings(model_dir: str) -> None:
    first = TemplateSettings(
        prompt=PromptSettings(template="{{ x }}"), sampling=SamplingSettings(), model_dir=model_dir, max_model_len=2048
    )
    second = TemplateSettings(
        prompt=PromptSettings(template="{{ x }}o"), sampling=SamplingSettings(), model_dir=model_dir, max_model_len=2048
    )
    assert pickle.loads(pickle.dumps(first)) == first
    for _ in range(2):
        assert template_shard(shard(x=["Hello"]), first).column(PROMPT_IDS).to_pylist() == [GOOD_IDS]
        assert template_shard(shard(x=["Hell"]), second).column(PROMPT_IDS).to_pylist() == [GOOD_IDS]


def test_templating_is_fast_enough_to_feed_an_engine(make: Any) -> None:
    stage = make({"messages": "m"})
    table = shard(m=[chat("The quick brown fox jumps over the lazy dog. " * 10)] * 1000)
    started = time.monotonic()
    stage(table)
    assert 1000 / (time.monotonic() - started) > 1000  # 26,000 rows/s on one idle core
