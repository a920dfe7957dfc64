"""Which engine arguments the installed vLLM takes, read from its source text: importing it would take 5 s.

Knows a name from a misspelt one, nothing of values. Invariant: nothing of vLLM is executed.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_SOURCE = Path("engine", "arg_utils.py")
_CLASS = "EngineArgs"


@cache
def known_arguments() -> frozenset[str] | None:
    """Fields of vLLM's `EngineArgs`; None where there is no vLLM, or one whose source looks different. Takes 40 ms."""
    package = find_spec("vllm")  # finds a top-level package without importing it
    for folder in (package.submodule_search_locations or []) if package else []:
        try:
            module = ast.parse((Path(folder) / _SOURCE).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        return _fields(module, _CLASS) or None
    return None


def likely_name(name: str, known: Collection[str]) -> str:
    """What to do about a name that isn't known: "did you mean `max_num_seqs`?"."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{close[0]}`?" if close else "leave it out, or correct it"


def _fields(module: ast.Module, class_name: str) -> frozenset[str]:
    """Names that a dataclass declares itself."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            declared = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            return frozenset(target.id for target in declared if isinstance(target, ast.Name))
    return frozenset()
