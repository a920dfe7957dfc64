"""The two answers about a label, where any number of labels may fit. Light: the command line checks specs with it."""

from __future__ import annotations

YES, NO = "yes", "no"


def yes_or_no(choice: str) -> tuple[str, str]:
    """That it fits, and that it doesn't."""
    return f"{choice}: {YES}", f"{choice}: {NO}"
