"""`kind: label` in a spec: its rules, and the prompt that it stands for. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from jobs.yaml_source import FieldPath, Problem
from pipeline.settings import LabelExample, LabelSettings
from pipeline.yes_or_no import yes_or_no

LABEL = "label"
_OURS = ("messages", "template", "examples")
"""Fields of `prompt` that a labelling job makes itself."""
_OPENING = ("{{", "{%", "{#")
_PLACEHOLDER = {"template": "-"}


def expand_label(data: dict[str, Any]) -> None:
    """Fill in the prompt that a labelling spec stands for; a wrong `label` gets one that hides no other mistake."""
    given = data.get("prompt") or {}
    is_label = data.get("kind") == LABEL or data.get("label") is not None
    if not is_label or not isinstance(given, dict) or any(name in given for name in _OURS):
        return
    try:
        label = LabelSettings.model_validate_json(json.dumps(data.get("label")), strict=True)
    except ValidationError:
        data["prompt"] = {**given, **_PLACEHOLDER}
    else:
        data["prompt"] = {**given, **label_prompt(label)}
    data.setdefault("sampling", {"temperature": 0.0, "max_tokens": 1})  # `prepare` makes room for the longest label


def label_prompt(label: LabelSettings) -> dict[str, Any]:
    """Template and examples: what is asked, the labels with their meaning, and the text, in one user message."""
    template = as_template(_question(label, _MARK)).replace(_MARK, f"{{{{ {label.text} }}}}")
    # Examples are literal text, as `prompt.examples` is.
    return {
        "template": template,
        "examples": [{"user": _question(label, one.text), "assistant": _answer(label, one)} for one in label.examples],
    }


_MARK = "\0"  # no YAML text holds it
_SEVERAL = "Answer with a line for each label: the label, a colon, and yes if it fits or no if it doesn't."


def _question(label: LabelSettings, text: str) -> str:
    meanings = label.choices if isinstance(label.choices, dict) else dict.fromkeys(label.choices, "")
    lines = [f"- {name}: {meaning}" if meaning else f"- {name}" for name, meaning in meanings.items()]
    labels = "\n".join(lines)
    how = _SEVERAL if label.multi else "Answer with the label alone."
    return f"{label.instructions.strip()}\n\nLabels:\n{labels}\n\nText:\n{text}\n\n{how}"


def _answer(label: LabelSettings, example: LabelExample) -> str:
    """Of several labels a line each, the order of the choices being what rows are asked in."""
    if not label.multi:
        return example.label or ""
    fitting = example.labels or ()
    return "\n".join(yes_or_no(name)[name not in fitting] for name in label.names)


def as_template(text: str) -> str:
    """Text as a template that renders to it."""
    for opening in _OPENING:
        text = text.replace(opening, f"\1{opening}\2")
    return text.replace("\1", "{{ '").replace("\2", "' }}")


def check_label(given: Mapping[str, Any], label: LabelSettings | None) -> list[Problem]:
    """Broken rules of a labelling job, or of a `label` where there is none.

    Args:
        given: the spec as written.
        label: its section, None if it is wrong by itself.
    """
    if given.get("kind") != LABEL:
        if given.get("label") is None or given.get("kind") not in (None, "complete"):
            return []
        message = "`label` is given, but `kind` is complete"
        return [Problem(("label",), message, hint="write `kind: label`", on_key=True)]
    if given.get("label") is None:
        hint = "add `label: {text: COLUMN, choices: [...]}`, or leave `kind` out"
        return [Problem(("kind",), "`kind` is label, but there is no `label`", hint=hint)]
    problems = [*_check_others(given)]
    if label is not None:
        problems += [*_check_choices(label), *_check_text(label)]
    return problems


def _check_others(given: Mapping[str, Any]) -> Iterator[Problem]:
    prompt = given.get("prompt")
    for name in _OURS:
        if isinstance(prompt, dict) and name in prompt:
            hint = "leave it out; say what to do in `label.instructions` and `label.examples`"
            yield Problem(("prompt", name), f"a labelling job makes its own `prompt.{name}`", hint=hint, on_key=True)
    if given.get("sampling"):
        message = "a labelling job draws no tokens: it compares the probabilities of all labels"
        yield Problem(("sampling",), message, hint="leave `sampling` out", on_key=True)


def _check_choices(label: LabelSettings) -> Iterator[Problem]:
    path: FieldPath = ("label", "choices")
    names = label.names
    if len(names) < (1 if label.multi else 2):
        yield Problem(path, "`label.choices` leaves nothing to choose", hint="give at least two")
        return
    wrong = [name for name in names if name != name.strip() or not name]
    if wrong:
        message = f"`label.choices`: {wrong[0]!r} is empty or begins or ends with a space"
        yield Problem(path, message, hint="remove the spaces")
    twice = _first_repeated(names)
    if twice is not None:
        yield Problem(path, f"`label.choices` has {twice!r} twice", hint="remove one")
    if label.threshold is not None and not label.multi:
        message = "`label.threshold` is given, but a row gets one label: the most probable"
        yield Problem(("label", "threshold"), message, hint="write `multi: true`, or leave it out", on_key=True)
    for index, one in enumerate(label.examples):
        yield from _check_example(label, one, ("label", "examples", index))


def _check_example(label: LabelSettings, one: LabelExample, path: FieldPath) -> Iterator[Problem]:
    field, other = ("labels", "label") if label.multi else ("label", "labels")
    if getattr(one, field) is None or getattr(one, other) is not None:
        given = "true" if label.multi else "false"
        message = f"`label.multi` is {given}, so an example says what fits in `{field}`"
        yield Problem(path, message, hint="write `labels: [...]`" if label.multi else "write `label: ...`")
        return
    said = one.labels if label.multi else [one.label]
    for name in said or ():
        if name not in label.names:
            hint = f"use one of {', '.join(label.names[:12])}"
            yield Problem((*path, field), f"`{name}` is not one of the choices", hint=hint)


def _check_text(label: LabelSettings) -> Iterator[Problem]:
    if not label.text.isidentifier():
        message = f"`label.text` is {label.text!r}, which can't be a column of a template"
        yield Problem(("label", "text"), message, hint="rename the column: letters, digits and underscores")


def _first_repeated(names: Sequence[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)
