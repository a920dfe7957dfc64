"""Specs from YAML text: every broken one is answered with its place, its line and its cure, all errors at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.init_template import init_template
from jobs.job_spec import JobSpec
from jobs.spec import load_spec, parse_spec, spec_json_schema
from jobs.spec_fields import all_fields
from pipeline.errors import RowError, SpecError
from pipeline.sampling import row_sampling
from pipeline.settings import SamplingSettings
from tests.machine_speed import Slowdown, quiet_heap, slowdown
from tests.whole_runs import write_prompts

BROKEN = sorted((Path(__file__).parent / "broken_specs").glob("*.yaml"))
MINIMAL = "\n".join(
    [
        "name: job",
        "model: {source: tiny}",
        "input: {path: in.parquet}",
        "prompt: {messages: messages}",
        "output: {path: out}",
        "",
    ]
)
ISSUE_SPEC = """
name: quickstart
model:    {source: tiny, revision: null, dtype: bfloat16, max_model_len: 2048, engine_args: {}}
input:    {path: prompts/*.parquet, id: null, limit: null}
prompt:   {messages: messages}          # or template: "...{{ column }}...", system:, examples: [{user:, assistant:}]
sampling: {n: 1, temperature: 0.7, top_p: 1.0, max_tokens: 256, seed: 1, stop: [], column: null}
output:   {path: out/quickstart, keep: all, resume: if_possible}
routing:  {level: counts, slice_by: null}
limits:   {max_failed_fraction: 0.1, request_timeout_s: 600, max_attempts: 3}
fleet:    {pools: [{gpu: cpu, replicas: 1, tensor_parallel: 1}]}
"""


@dataclass(frozen=True)
class Expected:
    """One `# expect: LINE:COLUMN part | part` line of a broken spec."""

    line: int
    column: int
    parts: list[str]


def expectations(text: str) -> list[Expected]:
    found = re.findall(r"^# expect: (\d+):(\d+) (.*)$", text, flags=re.MULTILINE)
    return [Expected(int(line), int(column), parts.split(" | ")) for line, column, parts in found]


def message_of(text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, name="job.yaml", overrides=overrides)
    assert caught.value.exit_code == 2
    return caught.value.message


def blocks_of(message: str, name: str) -> dict[tuple[int, int], str]:
    """{(line, column): block} of a message that reports places in a file."""
    starts = list(re.finditer(rf"^{re.escape(name)}:(\d+):(\d+): ", message, flags=re.MULTILINE))
    ends = [start.start() for start in starts[1:]] + [len(message)]
    return {
        (int(start[1]), int(start[2])): message[start.start() : end] for start, end in zip(starts, ends, strict=True)
    }


def test_corpus_holds_at_least_forty_broken_specs() -> None:
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_broken_spec_is_answered_with_its_places_and_nothing_else(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    expected = expectations(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    blocks = blocks_of(caught.value.message, str(path))
    assert list(blocks) == sorted((one.line, one.column) for one in expected), caught.value.message
    for one in expected:
        block = blocks[one.line, one.column]
        for part in one.parts:
            assert part in block, block


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_broken_spec_shows_the_line_with_a_caret_under_the_place(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    for (line, column), block in blocks_of(caught.value.message, str(path)).items():
        source = lines[line - 1] if line <= len(lines) else ""
        if not source.strip():
            assert " | " not in block.partition("\n")[2]
            continue
        _, shown, carets, *_ = block.split("\n")
        assert shown == f"{line:>5} | {source}"
        # Wide characters take two columns on a terminal, so the padding is never shorter than the text before.
        assert carets.startswith("      | ")
        padding = carets.removeprefix("      | ").partition("^")[0]
        wide = sum(1 for character in source[: column - 1] if ord(character) > 0x2E80)
        assert len(padding) == column - 1 + wide


def test_long_line_is_cut_around_the_place() -> None:
    text = MINIMAL.replace("{messages: messages}", f'{{system: "{"x" * 5000}", messages: 7}}')
    message = message_of(text)
    shown = next(line for line in message.split("\n") if line.startswith("    4 | "))
    assert len(shown) < 120
    assert "messages: 7" in shown


def test_issue_example_is_valid() -> None:
    spec = parse_spec(ISSUE_SPEC, name="job.yaml")
    assert spec.sampling.temperature == 0.7
    assert spec.input.path == "prompts/*.parquet"


def test_unquoted_off_yes_and_dates_stay_text() -> None:
    spec = parse_spec(MINIMAL + "routing: {level: off, slice_by: 2026-01-01}\n", name="job.yaml")
    assert spec.routing.level == "off"
    assert spec.routing.slice_by == "2026-01-01"


@pytest.mark.parametrize(("written", "value"), [("1e-1", 0.1), ("1", 1.0), (".5", 0.5), ("2.", 2.0), ("+0.25", 0.25)])
def test_numbers_are_read_as_people_write_them(written: str, value: float) -> None:
    spec = parse_spec(f"{MINIMAL}sampling: {{temperature: {written}}}\n", name="job.yaml")
    assert spec.sampling.temperature == value


def test_section_with_every_line_commented_out_means_its_defaults() -> None:
    spec = parse_spec(MINIMAL + "sampling:\n  # n: 2\n", name="job.yaml")
    assert spec.sampling.n == 1


def test_output_beside_a_shallow_glob_is_allowed() -> None:
    text = MINIMAL.replace("in.parquet", "data/*.parquet").replace("{path: out}", "{path: data/out}")
    assert parse_spec(text, name="job.yaml").output.path == "data/out"


def test_output_that_reaches_its_input_through_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    text = MINIMAL.replace("in.parquet", str(tmp_path / "data"))
    assert "lies within the input" in message_of(text.replace("{path: out}", f"{{path: {tmp_path}/link/out}}"))


def test_wrong_field_does_not_cause_a_report_about_its_default() -> None:
    text = MINIMAL.replace("{source: tiny}", "{source: tiny, max_model_len: lots}") + "sampling: {max_tokens: 4000}\n"
    message = message_of(text)
    assert "`model.max_model_len` is lots" in message
    assert "max_tokens" not in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml: there is no such file; `tramontane init`"):
        load_spec(tmp_path / "nowhere.yaml")


def test_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="can't be read: Is a directory"):
        load_spec(tmp_path)


def test_text_that_is_not_utf8_is_refused_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: job\nmodel: {source: caf\xe9}\n")
    with pytest.raises(SpecError, match=r"latin\.yaml:2:20: not UTF-8"):
        load_spec(path)


def test_rows_in_the_place_of_a_spec_are_known_as_such(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"rows\.parquet is a Parquet file; name the job's YAML file"):
        load_spec(write_prompts(tmp_path / "rows.parquet", 3))


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_spec(path).name == "job"


def test_spec_is_frozen() -> None:
    spec = parse_spec(MINIMAL, name="job.yaml")
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"


BOMBS = {
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "deep lists": "name: " + "[" * 1_000_000,
    "deep mappings": "name: " + "{a: " * 200_000,
    "deep blocks": "".join(" " * depth + "a:\n" for depth in range(1_400)),
    "many values": "name: [" + "a," * 500_000 + "]",
    "many keys": "".join(f"k{index}: 1\n" for index in range(100_000)),
    "many unknown keys": "".join(f"key_{index}: 1\n" for index in range(9_900)),
    "many unknown engine arguments": "model: {engine_args: {"
    + "".join(f"a-{index}: 1," for index in range(9_900))
    + "}}",
    "many duplicates": "k: 1\n" * 100_000,
    "many duplicates of many": "".join(f"k{index % 4_950}: 1\n" for index in range(9_900)),
    "many aliases": "name: [" + "*a," * 19_000 + "]",
    "duplicate of a bomb": "name: a\nname: " + "[" * 500_000,
    "long number": "name: " + "9" * 1_000_000,
    "long text": "name: " + "x" * 1_000_000,
    "too large": "name: job #" + "x" * 2_000_000,
    "deep keys": "? " * 300_000,
    "one long comment": "#" * 1_000_000,
    "constant template": MINIMAL.replace("messages: messages", "template: \"{{ 'a' * 10**11 }}{{ 9**9**9**9 }} {{\""),
    "deep template": MINIMAL.replace("messages: messages", f'template: "{{{{ {"(" * 100_000} }}}}"'),
}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_text_is_refused_within_a_second(name: str) -> None:
    with quiet_heap():
        start = time.thread_time()
        message = message_of(BOMBS[name])
        took = time.thread_time() - start
    assert took < slowdown()
    assert len(message) < 200_000


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    where=st.integers(0, len(ISSUE_SPEC)),
    cut=st.integers(0, 12),
    put=st.text(st.sampled_from("{}[]:,#&*!|>'\"%@`-? \n\t~0a1.é\0"), max_size=6),
)
def test_damaged_spec_is_a_spec_or_a_spec_error(where: int, cut: int, put: str) -> None:
    damaged = ISSUE_SPEC[:where] + put + ISSUE_SPEC[where + cut :]
    try:
        message = f"job.yaml: {parse_spec(damaged, name='job.yaml').name} is valid"
    except SpecError as error:
        message = error.message
    assert message.startswith("job.yaml:")


def test_override_wins_over_the_file() -> None:
    spec = parse_spec(MINIMAL + "sampling: {n: 2}\n", name="job.yaml", overrides=["sampling.n=3", "name=other"])
    assert (spec.sampling.n, spec.name) == (3, "other")


def test_last_of_two_overrides_wins() -> None:
    spec = parse_spec(MINIMAL, name="job.yaml", overrides=["sampling.n=3", "sampling.n=4"])
    assert spec.sampling.n == 4


@pytest.mark.parametrize("path", ["fleet.pools[0].replicas", "fleet.pools.0.replicas"])
def test_override_reaches_into_a_list_that_the_file_leaves_at_its_default(path: str) -> None:
    assert parse_spec(MINIMAL, name="job.yaml", overrides=[f"{path}=5"]).fleet.pools[0].replicas == 5


@pytest.mark.parametrize(
    ("override", "value"), [("=[a, b]", ["a", "b"]), ("=['x=y']", ["x=y"]), ("=[]", []), ('=["1.10"]', ["1.10"])]
)
def test_override_values_are_yaml(override: str, value: list[str]) -> None:
    assert parse_spec(MINIMAL, name="job.yaml", overrides=[f"sampling.stop{override}"]).sampling.stop == value


def test_override_sets_any_engine_argument() -> None:
    spec = parse_spec(MINIMAL, name="job.yaml", overrides=["model.engine_args.hf_overrides.a=1"])
    assert spec.model.engine_args == {"hf_overrides": {"a": 1}}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sampling.temprature=0", ["`sampling.temprature` is not a field", "did you mean `sampling.temperature`?"]),
        ("temperature=0", ["did you mean `sampling.temperature`?"]),
        ("sampling.temp=0", ["did you mean `sampling.temperature`?"]),
        ("sampler.n=0", ["`sampler` is not a field", "did you mean `sampling`?"]),
        ("gpu=H100", ["did you mean `fleet.pools[0].gpu`?"]),
        ("tensor_parallel_size=2", ["did you mean `fleet.pools[0].tensor_parallel`?"]),
        ("sampling.temperature=hot", ["`sampling.temperature` is hot, but must be a number from 0 to 10"]),
        ("sampling.n", ["no `=`", "--set sampling.temperature=0"]),
        ("sampling..n=1", ["`sampling..n` is not a path"]),
        ("fleet.pools[0.gpu=1", ["`fleet.pools[0.gpu` is not a path", "fleet.pools[0].replicas"]),
        ("=1", ["`` is not a path"]),
        ("sampling.stop=[a", ["not YAML"]),
        ("sampling.stop=*a", ["alias"]),
        ("fleet.pools[3].gpu=cpu", ["`fleet.pools` has 1 entries"]),
        ("fleet.pools.gpu=cpu", ["`fleet.pools` is a list", "fleet.pools[0].gpu"]),
        ("name.first=x", ["`name` is not a mapping"]),
        ("sampling[0]=x", ["`sampling` is not a list"]),
        ("model.engine_args.seed=3", ["not an engine argument to set here", "set `sampling.seed`"]),
        ("sampling.max_tokens=2048", ["leaves no room", "`model.max_model_len`, 2048"]),
        ("prompt.template={{ a }}", ["can't be a key", "quote it"]),
        ("model=tiny", ["`model` is tiny, but must be a mapping"]),
    ],
)
def test_broken_override_is_named_by_its_text_and_not_by_a_line(override: str, parts: list[str]) -> None:
    message = message_of(MINIMAL, override)
    assert message.startswith(f"--set {override}: ")
    assert "job.yaml" not in message
    for part in parts:
        assert part in message


def test_errors_of_the_file_and_of_overrides_come_together() -> None:
    message = message_of(MINIMAL + "sampling: {n: 0}\n", "sampling.seed=x", "nmae=b")
    assert message.startswith("job.yaml: 3 errors\njob.yaml:6:15: ")
    assert "\n--set sampling.seed=x: " in message
    assert "\n--set nmae=b: " in message


def test_override_cures_what_is_wrong_in_the_file() -> None:
    spec = parse_spec(MINIMAL + "sampling: {n: zero}\n", name="job.yaml", overrides=["sampling.n=2"])
    assert spec.sampling.n == 2


def test_init_template_is_valid_as_it_is() -> None:
    assert parse_spec(init_template(), name="init").name == "quickstart"


def test_init_template_is_valid_with_every_field_in_force() -> None:
    text = re.sub(r"^( *)#(\w+:)", r"\1\2", init_template(), flags=re.MULTILINE)
    spec = parse_spec(text, name="init")
    assert spec == parse_spec(init_template(), name="init")
    assert spec.model_fields_set == set(JobSpec.model_fields)
    assert spec.sampling.model_fields_set == set(type(spec.sampling).model_fields)


def test_init_template_is_valid_with_any_one_field_in_force() -> None:
    text = init_template()
    off = list(re.finditer(r"^ *#(?=\w+:)", text, flags=re.MULTILINE))
    assert len(off) > 25
    for found in off:
        parse_spec(text[: found.end() - 1] + text[found.end() :], name=found.group())


def test_init_template_holds_every_field_with_its_documentation() -> None:
    text = init_template()
    words = " ".join(re.sub(r"^ *# ", "", line) for line in text.split("\n"))
    for node in all_fields():
        assert re.search(rf"(^[ #-]*|{{|, ){node.path[-1]}:", text, flags=re.MULTILINE), node.dotted
        if len(node.path) < 3 or node.path[:2] == ("fleet", "pools"):
            assert " ".join(node.doc.split()) in " ".join(words.split()), node.dotted


def test_init_template_quotes_what_yaml_would_misread() -> None:
    text = init_template(name="2026", input_path="*.parquet", output_path="a: b")
    spec = parse_spec(text, name="init")
    assert (spec.name, spec.input.path, spec.output.path) == ("2026", "*.parquet", "a: b")


def test_json_schema_documents_every_field() -> None:
    schema = spec_json_schema()
    assert schema["additionalProperties"] is False
    for definition in schema["$defs"].values():
        assert all("description" in entry for entry in definition["properties"].values())


@pytest.mark.parametrize("where", ["file", "override"])
def test_fleet_auto_is_short_for_a_pool_of_everything(where: str) -> None:
    short, overrides = (MINIMAL + "fleet: auto\n", []) if where == "file" else (MINIMAL, ["fleet=auto"])
    spec = parse_spec(short, name="job.yaml", overrides=overrides)
    long = "fleet: {pools: [{gpu: auto, replicas: max, tensor_parallel: auto}]}\n"
    assert spec == parse_spec(MINIMAL + long, name="job.yaml")
    assert parse_spec(json.dumps(spec.model_dump(mode="json")), name="dumped") == spec
    assert {"const": "auto"} in spec_json_schema()["properties"]["fleet"]["anyOf"]


def test_pools_may_name_types_of_the_specs_own() -> None:
    own = "fleet: {gpu_types: [{name: H20, memory_gib: 95, memory_gb_per_s: 4000, tflops: 148}], pools: [{gpu: H20}]}"
    spec = parse_spec(MINIMAL + own + "\n", name="job.yaml")
    assert spec.fleet.gpu_types[0].labels == ("H20",)


def run_python(code: str, cache: Path) -> str:
    """Run code in a fresh interpreter that may keep bytecode, as an installed program does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_validating_imports_nothing_heavy_and_takes_under_300_ms(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(init_template())
    code = (
        "import sys, time; start = time.process_time(); from jobs.spec import load_spec; "
        f"load_spec({str(path)!r}); print(time.process_time() - start); print(*sys.modules)"
    )
    with Slowdown() as slowdown:
        results = [run_python(code, tmp_path / "cache").split("\n") for _ in range(6)]
    heavy = {"ray", "torch", "transformers", "vllm", "mistral_common", "pyarrow", "pandas", "numpy", "jinja2"}
    assert not heavy & set(results[0][1].split())
    assert min(float(seconds) for seconds, *_ in results[1:]) < 0.3 * slowdown.factor


MODELS = """
from __future__ import annotations
from collections.abc import Callable
from pydantic import BaseModel, Field

class Part(BaseModel):
    name: str = Field(max_length=20)

class Ticket(BaseModel):
    title: str = Field(min_length=3, max_length=40)
    parts: list[Part]

NUMBER = 3
class Wild(BaseModel):
    call: Callable[[], int]
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "records.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    return tmp_path


def test_a_schema_can_be_a_pydantic_models_name(models: Path) -> None:
    spec = parse_spec(MINIMAL + "sampling: {json_schema: lib/records.py:Ticket}\n", name="job.yaml")
    schema = spec.sampling.json_schema
    assert schema is not None
    assert schema["properties"]["title"] == {"maxLength": 40, "minLength": 3, "title": "Title", "type": "string"}
    assert schema["$defs"]["Part"]["properties"]["name"]["maxLength"] == 20
    assert spec.files == ("lib/records.py",)
    assert spec.model_copy(update={"name": "other"}).files == spec.files
    same = parse_spec(MINIMAL, name="job.yaml", overrides=["sampling.json_schema=lib/records.py:Ticket"])
    assert same.sampling == spec.sampling


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("lib/records.py:Nobody", "lib/records.py has no pydantic model 'Nobody'"),
        ("lib/records.py:NUMBER", "has no pydantic model 'NUMBER'"),
        ("lib/records.py:Wild", "has no JSON schema"),
        ("lib/other.py:Ticket", "there is no file lib/other.py"),
        ("broken.py:Ticket", "broken.py can't be run: ZeroDivisionError"),
        ("../records.py:Ticket", "names no pydantic model"),
        ("/etc/records.py:Ticket", "names no pydantic model"),
        ("records:Ticket", "names no pydantic model"),
    ],
)
def test_a_models_name_that_means_nothing_is_one_error_at_its_place(models: Path, named: str, said: str) -> None:
    text = MINIMAL + f"sampling:\n  json_schema: {named}\n"
    with pytest.raises(SpecError) as caught:
        parse_spec(text, name="job.yaml")
    [(place, block)] = blocks_of(caught.value.message, "job.yaml").items()
    assert place == (7, 16)
    assert said in block


def test_a_row_can_not_name_a_model(models: Path) -> None:
    with pytest.raises(RowError, match="json_schema"):
        row_sampling(SamplingSettings(), json.dumps({"json_schema": "broken.py:Ticket"}))
