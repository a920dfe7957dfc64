"""`kind: synthesize` in a spec: its rules. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.spec_templates import check_template
from jobs.yaml_source import FieldPath, Problem
from pipeline.synthesis_settings import TALK, SynthesisSettings

SYNTHESIZE = "synthesize"


def expand_synthesis(data: dict[str, Any]) -> None:
    """Give a synthesis its section with the defaults, where it has none."""
    if data.get("kind") == SYNTHESIZE and data.get(SYNTHESIZE) is None:
        data[SYNTHESIZE] = {}


def check_synthesis(given: Mapping[str, Any], synthesis: SynthesisSettings | None) -> list[Problem]:
    """Broken rules of a synthesis, or of a `synthesize` where there is none.

    Args:
        given: the spec as written.
        synthesis: its section, None if it is wrong by itself.
    """
    if given.get("kind") != SYNTHESIZE:
        if given.get(SYNTHESIZE) is None:
            return []
        message = "`synthesize` is given, but `kind` isn't"
        return [Problem((SYNTHESIZE,), message, hint="write `kind: synthesize`", on_key=True)]
    problems = [*_check_input(given)]
    if synthesis is not None:
        problems += [*_check_samplers(given, synthesis), *_check_patterns(synthesis), *_check_judge(synthesis)]
        problems += _check_conversation(given, synthesis)
    return problems


def _check_input(given: Mapping[str, Any]) -> Iterator[Problem]:
    section = given.get("input")
    if not isinstance(section, dict):
        return
    for name, value in (("new", "since_last_run"), ("format", "openai_batch")):
        if section.get(name) == value:
            message = f"a synthesis takes no `input.{name}: {value}`"
            yield Problem(("input", name), message, hint="leave it out", on_key=True)


def _check_samplers(given: Mapping[str, Any], synthesis: SynthesisSettings) -> Iterator[Problem]:
    prompt = given.get("prompt")
    if synthesis.samplers and isinstance(prompt, dict) and prompt.get("messages") is not None:
        hint = "write the prompt as `prompt.template`, which can name them"
        yield Problem(("prompt", "messages"), "a chat in a column has no place for samplers", hint=hint, on_key=True)
    for name in synthesis.samplers:
        if not name.isidentifier() or name.startswith("_"):
            path: FieldPath = (SYNTHESIZE, "samplers", name)
            hint = "use letters, digits and underscores"
            yield Problem(path, f"{name!r} can't be a column of a template", hint=hint, on_key=True)
        if name == TALK and synthesis.conversation is not None:
            message = f"{name!r} is what the prompt for the user's turns calls the talk so far"
            yield Problem((SYNTHESIZE, "samplers", name), message, hint="give the sampler another name", on_key=True)


def _check_patterns(synthesis: SynthesisSettings) -> Iterator[Problem]:
    import re2

    for name in ("matches", "rejects"):
        pattern = getattr(synthesis.filters, name)
        options = re2.Options()
        options.log_errors = False
        try:
            re2.compile(pattern or "", options)
        except re2.error as error:
            path: FieldPath = (SYNTHESIZE, "filters", name)
            yield Problem(
                path, f"no regular expression: {_words(error)}", hint="RE2 has no look-around and no back-references"
            )


def _check_judge(synthesis: SynthesisSettings) -> Iterator[Problem]:
    if synthesis.judge is not None:
        yield from check_template((SYNTHESIZE, "judge", "instructions"), synthesis.judge.instructions)


def _check_conversation(given: Mapping[str, Any], synthesis: SynthesisSettings) -> Iterator[Problem]:
    if synthesis.conversation is None:
        return
    yield from check_template((SYNTHESIZE, "conversation", "user"), synthesis.conversation.user)
    if re.search(r"{[{%].*\bconversation\b", synthesis.conversation.user, re.DOTALL) is None:
        message = "the model would be asked for the user's next message without having seen the talk"
        yield Problem((SYNTHESIZE, "conversation", "user"), message, hint="put `{{ conversation }}` into it")
    section = given.get("sampling")
    for name in ("json_schema", "json_object", "column"):
        if isinstance(section, dict) and section.get(name) not in (None, False):
            message = f"a conversation takes no `sampling.{name}`"
            yield Problem(("sampling", name), message, hint="leave it out, or `synthesize.conversation`", on_key=True)


def _words(error: Exception) -> str:
    said = error.args[0] if error.args else ""
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)
