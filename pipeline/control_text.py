"""Which strings a Hugging Face tokenizer turns into control ids, and how to take that power from them in a row's text.

Pure once given a tokenizer. Control tokens are the special tokens and the added ones such as `<tool_call>`; byte
tokens (`<0x0A>`), added runs of whitespace and the unknown token are ways of writing text, so they are not.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BREAK = "\u200b"
# NFC makes one character of at most four (U+1F82 and its like).
_NFC_SHRINKS = 4


@dataclass(frozen=True, slots=True)
class ControlText:
    """Ids that text must never produce, and the strings that would."""

    ids: frozenset[int]
    strings: re.Pattern[str] | None

    def neutralise(self, text: str) -> str:
        """Put a zero-width space after the first character of every control string in `text`."""
        if self.strings is None:
            return text
        # Again until nothing is found: breaking one string can leave another that overlapped it.
        for _ in range(8):
            text, found = self.strings.subn(lambda match: match[0][0] + _BREAK + match[0][1:], text)
            if not found:
                break
        return text

    def count(self, ids: Sequence[int]) -> Counter[int]:
        """Count each control id."""
        return Counter(token for token in ids if token in self.ids)


def control_text(tokenizer: Any) -> ControlText:
    """Read the control tokens of a Hugging Face tokenizer."""
    special = set(tokenizer.all_special_tokens)
    ids: set[int] = set()
    strings = {token for token in special if len(token) > 1}
    for index, added in tokenizer.added_tokens_decoder.items():
        content = added.content
        if added.special or content in special or _acts_as_control(content):
            ids.add(index)
            strings |= {content} if len(content) > 1 else set()
    ids |= set(tokenizer.all_special_ids)
    ids.discard(tokenizer.unk_token_id)
    ids -= {index for index in ids if _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(index)))}
    longest_first = sorted(strings, key=lambda string: (-len(string), string))
    return ControlText(
        ids=frozenset(ids),
        strings=re.compile("|".join(re.escape(string) for string in longest_first)) if strings else None,
    )


def _acts_as_control(content: str) -> bool:
    return len(content) > 1 and not content.isspace() and not _BYTE.fullmatch(content)


def longest_token_chars(tokenizer: Any) -> int | None:
    """Return the most characters of text that one token can stand for, None when that can't be told.

    It can for BPE over bytes or with byte fallback, where every character takes part in some token. Vocabularies with
    an unknown token, and normalizers or added tokens that swallow text, have no bound.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description = json.loads(backend.to_str())
    model = description["model"]
    whole = model.get("type") == "BPE" and _keeps_all_text(description)
    shrink = _normalizer_shrinks(description.get("normalizer"))
    swallows = any(added.lstrip or added.rstrip for added in tokenizer.added_tokens_decoder.values())
    if not whole or shrink is None or swallows:
        return None
    return shrink * max(len(token) for token in tokenizer.get_vocab())


def _keeps_all_text(description: dict[str, Any]) -> bool:
    """Whether every character reaches the vocabulary, as bytes if need be, and no pre-tokenizer drops any."""
    pre = description.get("pre_tokenizer")
    steps = pre.get("pretokenizers", [pre]) if pre else []
    kinds = {step["type"] for step in steps}
    removes = any(step.get("behavior") == "Removed" for step in steps)
    if removes or kinds - {"ByteLevel", "Metaspace", "Split", "Digits"}:
        return False
    return "ByteLevel" in kinds or bool(description["model"].get("byte_fallback"))


def _normalizer_shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """By what factor at most a normalizer shortens text; None when it may drop any amount."""
    if normalizer is None:
        return 1
    factor = 1
    for step in normalizer.get("normalizers", [normalizer]):
        if step["type"] == "NFC":
            factor *= _NFC_SHRINKS
        elif step["type"] != "Prepend" and not _replaces_one_for_one(step):
            return None
    return factor


def _replaces_one_for_one(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step.get("pattern") == {"String": " "} and len(step.get("content", "")) >= 1
