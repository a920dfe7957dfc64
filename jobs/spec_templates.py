"""Syntax of the Jinja texts in a spec, checked without ever evaluating one.

Knows nothing of the input's columns. Only parses: compiling folds constants, and `{{ "a" * 10**10 }}` would be built.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from jobs.yaml_source import FieldPath, Problem

_SINGLE_BRACES = re.compile(r"\{([A-Za-z_]\w*)\}")


def check_template(path: FieldPath, text: str) -> Iterator[Problem]:
    """Syntax errors, unknown filters and tests, and `{column}` where `{{ column }}` was meant."""
    if "{{" not in text and "{%" not in text:
        if path[-1] == "template":
            yield from _check_literal(path, text)
        return
    # Here because jinja2 takes 30 ms to import, and a spec without templates shouldn't pay for it.
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment()
    try:
        tree = environment.parse(text)
    except TemplateSyntaxError as error:
        yield Problem(path, f"template line {error.lineno}: {error.message}", line_in_value=error.lineno)
        return
    except RecursionError:
        yield Problem(path, "the template is nested too deeply")
        return
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        kind, known = ("filter", environment.filters) if isinstance(node, nodes.Filter) else ("test", environment.tests)
        if node.name not in known:
            yield _unknown(path, kind, node.name, node.lineno, sorted(known))


def _unknown(path: FieldPath, kind: str, name: str, line: int, known: list[str]) -> Problem:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"Jinja has: {', '.join(known)}"
    return Problem(path, f"template line {line}: no {kind} named `{name}`", hint=hint, line_in_value=line)


def _check_literal(path: FieldPath, text: str) -> Iterator[Problem]:
    if not text.strip():
        yield Problem(path, f"`{'.'.join(map(str, path))}` is empty", hint='write e.g. "Summarise: {{ text }}"')
    elif found := _SINGLE_BRACES.search(text):
        line = text.count("\n", 0, found.start()) + 1
        message = f"the template uses no column: {found.group()} is plain text in Jinja"
        yield Problem(path, message, hint=f"write {{{{ {found.group(1)} }}}}", line_in_value=line)
