"""The sandboxed Jinja environment, and the process that renders with it: rows or chats in, texts out as frames.

Run as a script it imports nothing of this project, so a restart costs 0.25 s; 0.05 s for chats, 0.7 s for chats as
transformers renders them. It trusts templates with neither time nor memory: the kernel ends it when a row runs too
long, and its address space is capped.

Parent to child: messages of a 4-byte length and a body, first JSON {templates, chat, timeout_s, memory_mib,
output_mib}, then Arrow IPC streams; with `chat`, JSON of messages and special tokens instead. Child to parent: a frame
when compiled and one per row or chat, in order: status byte, 4-byte length, JSON.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, Literal

from jinja2 import StrictUndefined, TemplateError, Undefined, UndefinedError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

ChatDialect = Literal["plain", "transformers"]
"""How a model's chat template is rendered: by Jinja with what nearly all of them need, or by transformers itself."""
_Renderer = Callable[[dict[str, Any]], str]

OK = 0
FAILED = 1
HEADER = struct.Struct("<BI")
LENGTH = struct.Struct("<I")

# Loading other templates has no meaning here; autoescape would evaluate its argument while merely being analysed.
_FORBIDDEN = (
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
    nodes.EvalContextModifier,
)
# The sandbox's classic escape routes and memory bombs (`lipsum(10**6)`) start from globals that no prompt needs.
CLOCK_FACTOR = 10
"""How much longer by the clock than on the processor a template may take."""
GLOBALS = ("range", "namespace", "cycler", "joiner", "dict")


class NullUsed(UndefinedError):
    """A template printed or computed with a null."""


class Null(StrictUndefined):
    """A null of the row, as templates see it: false, `is none`, open to `default`; anything else raises NullUsed.

    Jinja alone would print `None` into the prompt without a word.
    """

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        return str(self._undefined_name)

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return other is None or isinstance(other, Null)

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(None)

    def __repr__(self) -> str:
        raise NullUsed(self._undefined_message)


def _jsonable(value: object) -> object:
    """What `tojson` makes of the types that JSON lacks."""
    if isinstance(value, Null):
        return None
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | dt.timedelta):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} can't be written as JSON")


def _to_json(value: object, indent: int | None = None) -> str:
    """Plain JSON: Jinja's own filter escapes `<`, `>`, `&` and `'` for HTML, which would spoil a prompt."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_jsonable)


def _finalize(value: object) -> object:
    if value is None:
        raise NullUsed("an expression")
    return value


def template_environment() -> ImmutableSandboxedEnvironment:
    """Return a fresh environment: sandboxed, values immutable, undefined names and printed nulls are errors."""
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_finalize, cache_size=0)
    environment.globals = {name: environment.globals[name] for name in GLOBALS}
    environment.filters["tojson"] = _to_json
    environment.tests["none"] = lambda value: value is None or isinstance(value, Null)
    environment.tests["defined"] = lambda value: isinstance(value, Null) or not isinstance(value, Undefined)
    environment.tests["undefined"] = lambda value: isinstance(value, Undefined) and not isinstance(value, Null)
    return environment


def parse_template(environment: ImmutableSandboxedEnvironment, text: str) -> nodes.Template:
    """Parse without evaluating anything.

    Raises:
        TemplateError: the syntax is wrong, or a statement is used that prompts don't have; `lineno` says where.
        ValueError, RecursionError: a number of thousands of digits, nesting thousands deep.
    """
    tree = environment.parse(text)
    for node in tree.find_all(_FORBIDDEN):
        statement = {"EvalContextModifier": "autoescape", "ScopedEvalContextModifier": "autoescape"}
        name = statement.get(type(node).__name__, type(node).__name__.lower())
        error = TemplateError(f"`{{% {name} %}}` is not available in prompt templates")
        error.lineno = node.lineno  # type: ignore[attr-defined]
        raise error
    return tree


def with_nulls(value: Any, name: str) -> Any:
    """Replace None by Null, also inside lists and dicts."""
    if value is None:
        return Null(name=name, exc=NullUsed)
    if isinstance(value, dict):
        return {key: with_nulls(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [with_nulls(item, f"{name}[]") for item in value]
    return value


class Unreadable:
    """Stands for a value that Python can't represent, such as a date in the year 100,000."""

    def __init__(self, error: Exception) -> None:
        self.message = f"{type(error).__name__}: {error}"


def python_values(column: Any) -> list[Any]:
    """Return an Arrow column as Python values; one that Python can't hold becomes an Unreadable."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, UnicodeError, ArithmeticError):
        return [_python_value(cell) for cell in column]


def _python_value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError, UnicodeError, ArithmeticError) as error:
        return Unreadable(error)


def _contexts(table: Any) -> Iterator[dict[str, Any]]:
    """Yield each row as Python values by column name."""
    columns = [python_values(column) for column in table.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(table.column_names, values, strict=True))


def _as_seen(context: dict[str, Any]) -> dict[str, Any]:
    """The row as templates see it."""
    for name, value in context.items():
        if isinstance(value, Unreadable):
            raise TypeError(f"column {name!r}: {value.message}")
    return {name: with_nulls(value, name) for name, value in context.items()}


def _failure(error: BaseException) -> tuple[str, str]:
    """Return (kind, message) of whatever a template raised."""
    if isinstance(error, NullUsed):
        return "null_prompt", (
            f"the template uses a null ({error}); give a default, `{{{{ column | default('...') }}}}`, "
            "or test it, `{% if column is not none %}`"
        )
    if isinstance(error, MemoryError):
        return "template_memory", "the template needs more memory than prompts are allowed"
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if line else ""
    return "template_error", f"{type(error).__name__}{where}: {str(error)[:300]}"


def _render(templates: list[_Renderer], context: dict[str, Any], output_bytes: int) -> tuple[int, bytes]:
    values = _as_seen(context)
    texts = [render(values) for render in templates]
    if sum(len(text) for text in texts) > output_bytes:
        message = f"the rendered prompt is larger than the {output_bytes >> 20} MiB that are allowed"
        return FAILED, json.dumps(("template_output_too_big", message)).encode()
    return OK, json.dumps(texts, ensure_ascii=False).encode()


def guarded(work: Callable[[], tuple[int, bytes]], timeout_s: float) -> tuple[int, bytes]:
    """Do `work` under the kernel's timers, whose default action ends this process even inside a C loop.

    The time that counts is the processor's: on a node with a hundred runnable processes good rows failed by the clock.
    """
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    signal.setitimer(signal.ITIMER_REAL, CLOCK_FACTOR * timeout_s)
    try:
        return work()
    except Exception as error:  # noqa: BLE001  the boundary: whatever a template raises is that row's failure
        return FAILED, json.dumps(_failure(error)).encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _compile(texts: list[str]) -> list[_Renderer]:
    environment = template_environment()
    for text in texts:
        parse_template(environment, text)
    # Compiling folds constants, `{{ 'a' * 10**9 }}` included: only ever done here, inside the limits.
    return [environment.from_string(text).render for text in texts]


def _compile_plain_chats(texts: list[str]) -> list[_Renderer]:
    """As transformers does, without dates, `tojson` for tools and `{% generation %}`."""
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = ImmutableSandboxedEnvironment(**options)
    environment.globals["raise_exception"] = _refuse
    templates = [environment.from_string(text) for text in texts]
    return [partial(template.render, tools=None, documents=None, add_generation_prompt=True) for template in templates]


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _compile_transformers_chats(texts: list[str]) -> list[_Renderer]:
    """Compiled with the first chat, by transformers, which keeps it."""
    return [partial(_render_as_transformers, text) for text in texts]


def _render_as_transformers(template: str, values: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {name: value for name, value in values.items() if name != "messages"}
    texts, _ = render_jinja_template([values["messages"]], chat_template=template, add_generation_prompt=True, **tokens)
    return str(texts[0])


def _prepare(chat: ChatDialect | None) -> tuple[Callable[[list[str]], list[_Renderer]], Callable[[bytes], Any]]:
    """Import what rendering needs, which takes more address space than templates may; return compiler and reader."""
    if chat == "transformers":
        import transformers.utils.chat_template_utils  # noqa: F401

        return _compile_transformers_chats, _read_chat
    if chat == "plain":
        return _compile_plain_chats, _read_chat
    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_memory_pool(pa.system_memory_pool())
    return _compile, _read_rows


def _read_rows(message: bytes) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    return _contexts(pa.ipc.open_stream(message).read_all())


def _read_chat(message: bytes) -> list[dict[str, Any]]:
    return [json.loads(message)]


def _limit_resources(memory_mib: int) -> None:
    """Cap the growth of the address space from here on, and take away files and processes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    most = mapped + (memory_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _read_message(source: IO[bytes]) -> bytes | None:
    header = source.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(header)
    return source.read(size)


def _write_frame(sink: IO[bytes], status: int, payload: bytes) -> None:
    sink.write(HEADER.pack(status, len(payload)) + payload)
    sink.flush()


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer frames until the parent closes its end."""
    # What the parent ignores or blocks is inherited; an interrupt is the parent's to handle, after the rows in flight.
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGALRM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configuration = _read_message(source)
    if configuration is None:
        return
    settings = json.loads(configuration)
    compile_texts, read = _prepare(settings["chat"])
    _limit_resources(settings["memory_mib"])
    timeout_s, output_bytes = settings["timeout_s"], settings["output_mib"] << 20
    templates: list[_Renderer] = []

    def compile_all() -> tuple[int, bytes]:
        templates.extend(compile_texts(settings["templates"]))
        return OK, b"[]"

    _write_frame(sink, *guarded(compile_all, timeout_s))
    while (message := _read_message(source)) is not None:
        for context in read(message):
            _write_frame(sink, *guarded(partial(_render, templates, context, output_bytes), timeout_s))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
