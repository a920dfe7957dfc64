"""What the steps after a synthesis's run need, looked for before it: they would find out when all is paid for."""

from __future__ import annotations

from pipeline.errors import SpecError
from pipeline.jinja_guard import template_columns
from pipeline.languages import known_languages
from pipeline.synthesis_settings import TALK, SynthesisSettings


def columns_of_turns(synthesis: SynthesisSettings) -> frozenset[str]:
    """Columns of the input that the prompt for the user's next message names."""
    if synthesis.conversation is None:
        return frozenset()
    return frozenset(template_columns(synthesis.conversation.user) - {TALK})


def refuse_what_records_lack(synthesis: SynthesisSettings, columns: list[str]) -> None:
    """Raise SpecError where the steps after the run would find out: a language or a column that isn't known."""
    known = known_languages() if synthesis.filters.languages is not None else frozenset[str]()
    for code in synthesis.filters.languages or ():
        if code not in known:
            raise SpecError(
                f"synthesize.filters.languages: {code!r} is no language that can be found; use some of "
                f"{', '.join(sorted(known))}"
            )
    wanted = template_columns(synthesis.judge.instructions) if synthesis.judge is not None else frozenset[str]()
    for name in sorted(wanted - {"record", *columns}):
        raise SpecError(
            f"synthesize.judge.instructions needs {name!r}, which records don't have; they have record, "
            f"{', '.join(columns)}: name one of these, or carry the column along in `output.keep`"
        )
