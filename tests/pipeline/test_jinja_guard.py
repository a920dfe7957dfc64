"""Templates can't reach out, can't stall and can't swell; what they may do, they do on real values."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import jinja_child, jinja_process
from pipeline.errors import RowError, SpecError
from pipeline.jinja_guard import GuardedRenderer, has_expressions, template_columns
from pipeline.jinja_process import RenderLimits
from tests.machine_speed import wall_slowdown

WHEN = dt.datetime(2024, 2, 29, 12, 30, tzinfo=dt.UTC)


@pytest.fixture
def renderers() -> Iterator[list[GuardedRenderer]]:
    made: list[GuardedRenderer] = []
    yield made
    for renderer in made:
        renderer.close()


def render(template: str, columns: dict[str, list[object]], limits: RenderLimits | None = None) -> list[object]:
    """Texts of the rows, or kinds of their failures."""
    renderer = GuardedRenderer([template], limits)
    try:
        answers = renderer.render(pa.table(columns))
    finally:
        renderer.close()
    return [answer.kind if isinstance(answer, RowError) else answer[0] for answer in answers]


def render_here(template: str, row: dict[str, object]) -> str:
    """What the child does for one row, without the 0.25 s that a child costs; text or kind of failure."""
    try:
        _, payload = jinja_child._render(jinja_child._compile([template]), row, 8 << 20)
    except Exception as error:
        return jinja_child._failure(error)[0]
    return str(json.loads(payload)[0])


def test_rows_come_back_in_order() -> None:
    numbers: list[object] = list(range(3000))
    assert render("{{ n }}!", {"n": numbers, "unused": numbers}) == [f"{n}!" for n in numbers]


def test_several_templates_give_several_texts(renderers: list[GuardedRenderer]) -> None:
    renderers.append(GuardedRenderer(["a{{ x }}", "b{{ y }}", "c"]))
    table = pa.table({"x": [1, 2], "y": [3, 4]})
    assert renderers[0].render(table) == [["a1", "b3", "c"], ["a2", "b4", "c"]]
    assert renderers[0].columns == {"x", "y"}


def test_no_rows_give_no_answers() -> None:
    assert render("{{ x }}", {"x": []}) == []


def test_values_keep_their_types() -> None:
    table = pa.table(
        {
            "when": pa.array([WHEN], pa.timestamp("ns", tz="UTC")),
            "day": [WHEN.date()],
            "price": [decimal.Decimal("1.50")],
            "raw": [b"\xff"],
            "deep": [{"tags": ["a", "b"], "n": 2}],
            "kind": pa.array(["x"]).dictionary_encode(),
        }
    )
    template = (
        "{{ when.strftime('%d.%m.%Y') }} {{ when + (when - when) }} {{ day.year }} {{ price * 2 }} {{ raw[0] }} "
        "{{ deep.tags | join('+') }} {{ deep.n + 1 }} {{ kind }} {{ [when, price, deep] | tojson }}"
    )
    renderer = GuardedRenderer([template])
    [[text]] = renderer.render(table)
    renderer.close()
    assert text == (
        "29.02.2024 2024-02-29 12:30:00+00:00 2024 3.00 255 a+b 3 x "
        '["2024-02-29T12:30:00+00:00", "1.50", {"tags": ["a", "b"], "n": 2}]'
    )


def test_tojson_writes_json_and_not_html() -> None:
    assert render("{{ x | tojson }}", {"x": ["<a> & 'é'"]}) == ["\"<a> & 'é'\""]


PRINTED_NULLS = [
    "{{ x }}",
    "{{ x ~ '' }}",
    "{{ x | upper }}",
    "{{ '%s' | format(x) }}",
    "{{ [x] }}",
    "{{ x + 1 }}",
    "{{ x.y }}",
    "{{ x | join }}",
    "{% for c in x %}{% endfor %}",
    "{{ none }}",
    "{{ d.k }}",
    "{{ d.k ~ '' }}",
    "{{ d }}",
]


@pytest.mark.parametrize("template", PRINTED_NULLS)
def test_a_printed_null_is_a_failed_row_not_the_word_none(template: str) -> None:
    assert render_here(template, {"x": None, "d": {"k": None, "j": 1}}) == "null_prompt"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ x | default('-') }}", "-"),
        ("{{ x or '-' }}", "-"),
        ("{% if x %}a{% else %}b{% endif %}", "b"),
        ("{{ x is none }} {{ x is defined }} {{ x == none }}", "True True True"),
        ("{{ x | tojson }} {{ d | tojson }}", 'null {"k": null, "j": 1}'),
    ],
)
def test_a_null_can_be_handled_by_the_template(template: str, text: str) -> None:
    assert render_here(template, {"x": None, "d": {"k": None, "j": 1}}) == text


def test_a_missing_column_is_an_error_not_an_empty_text() -> None:
    assert render("{{ nope }}", {"x": [1]}) == ["template_error"]


def test_columns_are_found_without_running_anything() -> None:
    template = (
        "{% set local = a %}{{ local }}{% for item in b %}{{ item.c }}{{ loop.index }}{% endfor %}"
        "{% if d is defined %}{{ range(3) }}{% endif %}{% macro m(p) %}{{ p }}{{ e }}{% endmacro %}"
    )
    assert template_columns(template) == {"a", "b", "d", "e"}
    started = time.monotonic()
    assert template_columns("{{ 'a' * 10**9 }}{{ 10**(10**9) }}{{ 'a' | center(10**10) }}{{ x }}") == {"x"}
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{{ x", "line 2"),
        ("{% if x %}", "line 1"),
        ("{{ x | nofilter }}", "nofilter"),
        ("{% include 'x' %}", "include"),
        ("a\n\n{% import 'x' as y %}", "line 3"),
        ("{% extends 'x' %}", "extends"),
        ("{% autoescape 'a' | center(10**10) %}{% endautoescape %}", "autoescape"),
        ("{{ " + "9" * 5000 + " }}", "digits"),
        ("{{ " + "(" * 20_000 + " }}", "RecursionError"),
    ],
)
def test_a_template_that_cannot_be_parsed_is_a_spec_error_with_its_line(template: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        template_columns(template)


def test_plain_text_needs_no_rendering() -> None:
    assert not has_expressions("You are {kind} % and #helpful.")
    assert all(has_expressions(text) for text in ("{{ x }}", "{% if x %}{% endif %}", "{# note #}"))


SSTI = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ x.__init__.__globals__ }}",
    "{{ x|attr('__init__') }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ [].__class__.__base__ }}",
    "{{ {}.__class__ }}",
    "{{ config }}",
    "{{ config.items() }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__dict__ }}",
    "{{ request.application.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum.__globals__.os.system('id') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ range.__class__ }}",
    "{{ dict.__class__ }}",
    "{{ dict.mro() }}",
    "{{ dict.__subclasses__() }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ url_for.__globals__ }}",
    "{{ __import__('os') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ eval('1') }}",
    "{{ exec('1') }}",
    "{{ globals() }}",
    "{{ '{0.__class__}'.format(x) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(x) }}",
    "{{ '{a.__class__}'.format_map({'a': x}) }}",
    "{{ 'x'.format.__self__.__class__ }}",
    "{{ x.encode.__func__ }}",
    "{{ (x|map('upper')).gi_frame.f_globals }}",
    "{{ (x|map(attribute='__class__')|list)[0].mro() }}",
    "{{ [x]|map(attribute='__class__')|first|attr('mro') }}",
    "{{ [x]|groupby('__class__') }}",
    "{{ [x]|sort(attribute='__class__.__name__')|first|attr('__class__') }}",
    "{{ [1].append(2) }}",
    "{{ {'a': 1}.update({'b': 2}) }}",
    "{{ caller.__globals__ }}",
    "{{ loop.__class__ }}",
    "{% set n = namespace() %}{{ n.__class__ }}",
    "{% for k in self.__class__.__mro__ %}{{ k }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% call(x) self.__init__() %}{% endcall %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
]


@pytest.mark.parametrize("payload", SSTI)
def test_no_known_escape_from_the_sandbox_works(payload: str) -> None:
    answer = render_here(payload, {"x": "abc"})
    leaks = ("class", "root:", "uid=", "builtin", "module", "built-in")
    assert answer in {"template_error", "null_prompt"} or not any(word in answer for word in leaks)


def test_the_list_of_escapes_is_long() -> None:
    assert len(set(SSTI)) >= 40
    assert render_here("{{ x.upper() }}", {"x": "abc"}) == "ABC"  # the probe itself can tell text from failure


def test_an_escape_fails_in_the_child_as_a_row_error() -> None:
    assert render("{{ x.__class__ }}", {"x": [1]}) == ["template_error"]


def test_templates_in_rows_stay_text() -> None:
    rows: list[object] = list(SSTI)
    assert render("{{ x }}", {"x": rows}) == rows


def test_the_child_has_none_of_our_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-in-the-environment")
    renderer = GuardedRenderer(["{{ x }}"])
    pid = renderer._child._process.pid  # type: ignore[union-attr]
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    renderer.close()
    assert b"hunter2" not in environment


BOMBS = [
    ("{% if n == 2 %}{{ 'a' * 10**9 }}{% endif %}ok", "template_memory"),
    ("{% if n == 2 %}{{ 'a' | center(10**10) }}{% endif %}ok", "template_memory"),
    ("{% if n == 2 %}{{ [0] * 10**9 }}{% endif %}ok", "template_memory"),
    ("{% if n == 2 %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endif %}ok", "template_memory"),
    ("{% if n == 2 %}{{ 'a' * (9 * 10**6) }}{% endif %}ok", "template_output_too_big"),
    ("{% if n == 2 %}{{ range(10**9) | list }}{% endif %}ok", "template_error"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{% if n == 2 %}{{ f() }}{% endif %}ok", "template_error"),
    (
        "{% if n == 2 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok",
        "template_timeout",
    ),
    ("{% if n == 2 %}{{ (n + 1) ** (10 ** 9) }}{% endif %}ok", "template_timeout"),
]


@pytest.mark.parametrize(("template", "kind"), BOMBS)
def test_a_bomb_fails_its_row_within_the_limits_and_no_other(template: str, kind: str) -> None:
    started = time.monotonic()
    renderer = GuardedRenderer([template], RenderLimits(timeout_s=1.0))
    answers = renderer.render(pa.table({"n": [0, 1, 2, 3, 4]}))
    elapsed_s = time.monotonic() - started
    peak_mib = _peak_mib(renderer._child._process.pid)  # type: ignore[union-attr]
    renderer.close()
    found = [answer.kind if isinstance(answer, RowError) else answer[0] for answer in answers]
    assert found == ["ok", "ok", kind, "ok", "ok"]
    assert elapsed_s < 4
    assert peak_mib < 512


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("template", ["{{ 10**(10**9) }}", "{{ 'a' | center(10**10) | length }}{{ 9**(9**9**9) }}"])
def test_a_bomb_that_goes_off_while_compiling_is_a_spec_error(template: str) -> None:
    with pytest.raises(SpecError, match="can't be compiled"):
        GuardedRenderer([template], RenderLimits(timeout_s=0.5))


def test_the_default_limit_is_two_seconds_and_512_mib() -> None:
    assert RenderLimits().timeout_s == 2.0
    assert RenderLimits().memory_mib + 100 < 512


def test_neighbours_of_many_exploding_rows_are_rendered_and_the_rest_explodes_faster() -> None:
    template = "{% if n %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok"
    renderer = GuardedRenderer([template], RenderLimits(timeout_s=1.0))
    began = time.monotonic()
    answers = renderer.render(pa.table({"n": [1] * 8 + [0] + [1] * 4 + [0, 0]}))
    took = (time.monotonic() - began) / wall_slowdown()
    assert took < 5 * 1.0 + 7 * 0.1 + 6, "12 rows at 1 s each would take 12 s, and as much for new processes"
    good = [place for place, answer in enumerate(answers) if answer == ["ok"]]
    assert good == [8, 13, 14]
    bad = [answer.kind for answer in answers if isinstance(answer, RowError)]
    assert bad == ["template_timeout"] * 12
    renderer.close()


def test_a_column_named_like_a_jinja_global_is_the_column() -> None:
    assert render("{{ range }}", {"range": ["near", "far"]}) == ["near", "far"]


def test_rows_larger_than_a_chunk_are_rendered() -> None:
    big: list[object] = ["x" * (3 << 20) for _ in range(8)]
    assert render("{{ x | length }}", {"x": big}) == [str(3 << 20)] * 8


def test_a_row_too_large_for_the_child_fails_alone() -> None:
    rows: list[object] = ["x" * (97 << 20), "y"]
    assert render("{{ x | length }}", {"x": rows}) == ["template_memory", "1"]


def test_an_interrupt_from_the_terminal_leaves_the_child_working(renderers: list[GuardedRenderer]) -> None:
    renderers.append(GuardedRenderer(["{{ x }}"]))
    os.kill(renderers[0]._child._process.pid, signal.SIGINT)  # type: ignore[union-attr]
    assert renderers[0].render(pa.table({"x": [1]})) == [["1"]]


def test_a_stopped_child_is_replaced(renderers: list[GuardedRenderer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_process, "_GRACE_S", 0.2)
    renderers.append(GuardedRenderer(["{{ x }}"], RenderLimits(timeout_s=0.5)))
    os.kill(renderers[0]._child._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
    first, second = renderers[0].render(pa.table({"x": [1, 2]}))
    assert isinstance(first, RowError)
    assert (first.kind, second) == ("template_timeout", ["2"])


def test_time_in_which_a_template_gets_no_processor_is_not_its_own(renderers: list[GuardedRenderer]) -> None:
    template = "{% for i in range(99) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ x }}"  # 0.3 s
    renderers.append(GuardedRenderer([template], RenderLimits(timeout_s=2.0)))
    pid = renderers[0]._child._process.pid  # type: ignore[union-attr]

    def hold() -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3.0)  # longer than the template may take
        os.kill(pid, signal.SIGCONT)

    held = threading.Timer(0.1, hold)
    held.start()
    assert renderers[0].render(pa.table({"x": [1, 2]})) == [["1"], ["2"]]
    held.join()


def test_a_killed_child_is_replaced(renderers: list[GuardedRenderer]) -> None:
    renderers.append(GuardedRenderer(["{{ x }}"]))
    process = renderers[0]._child._process  # type: ignore[union-attr]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first, second = renderers[0].render(pa.table({"x": [1, 2]}))
    assert isinstance(first, RowError)
    assert first.kind == "template_memory"
    assert second == ["2"]


def test_a_dropped_renderer_leaves_no_process() -> None:
    renderer = GuardedRenderer(["{{ x }}"])
    pid = renderer._child._process.pid  # type: ignore[union-attr]
    del renderer
    assert not Path(f"/proc/{pid}").exists()


def test_a_value_that_python_cannot_hold_fails_its_row() -> None:
    dates = pa.array([0, 10**15], pa.timestamp("s"))
    renderer = GuardedRenderer(["{{ d.year }}"])
    good, bad = renderer.render(pa.table({"d": dates}))
    renderer.close()
    assert good == ["1970"]
    assert isinstance(bad, RowError)
    assert bad.kind == "template_error"


def test_a_simple_template_renders_thousands_of_rows_a_second() -> None:
    renderer = GuardedRenderer(["Summarize: {{ text }} ({{ n }})"])
    table = pa.table({"text": ["some text " * 30] * 10_000, "n": list(range(10_000))})
    started = time.monotonic()
    renderer.render(table)
    rows_per_s = 10_000 / (time.monotonic() - started) * wall_slowdown()
    renderer.close()
    assert rows_per_s > 5000  # 87,000 to 98,000 on two idle cores
