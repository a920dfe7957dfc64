"""Two numbers from 0 to 49 added, and the sum spelt out in one of five languages.

Held out: one in five unordered pairs, whichever language asks and in either order. Training also asks for sums in
digits and for numbers to be spelt, each of which is half of the task.
"""

from __future__ import annotations

import random

from tests.tiny_training.examples import LANGUAGES, Example, ask, held_out

LARGEST = 49
IN_WORDS = {"en": "in words", "fr": "en lettres", "it": "in lettere", "de": "in Worten", "es": "en letras"}

_WORDS = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
    "dix-huit dix-neuf",
    "it": "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici "
    "diciassette diciotto diciannove",
    "de": "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
    "siebzehn achtzehn neunzehn",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
    "diecisiete dieciocho diecinueve",
}
_TENS = {
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
    "fr": "vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt",
    "it": "venti trenta quaranta cinquanta sessanta settanta ottanta novanta",
    "de": "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    "es": "veinte treinta cuarenta cincuenta sesenta setenta ochenta noventa",
}


def number_example(rng: random.Random, language: str, *, test: bool, kind: str = "number") -> Example:
    """Kinds: `number` adds and spells, `sum` adds, `spelling` spells."""
    first, second = pair(rng, test=test)
    total = first + second
    if kind == "spelling":
        question, answer = f"{total} {IN_WORDS[language]}?", spell(total, language)
    elif kind == "sum":
        question, answer = f"{first} + {second} = ?", str(total)
    else:
        question, answer = f"{first} + {second} {IN_WORDS[language]}?", spell(total, language)
    return Example(task=kind, language=language, messages=ask(question), answer=answer)


def pair(rng: random.Random, *, test: bool) -> tuple[int, int]:
    """Draw two numbers to add, of evaluation or of training."""
    while True:
        first, second = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
        if held_out("sum", min(first, second), max(first, second)) == test:
            return first, second


def spell(number: int, language: str) -> str:
    """Spell 0 to 99."""
    if language not in LANGUAGES or not 0 <= number <= 99:
        raise ValueError(f"{number} in {language!r} can't be spelt; give 0 to 99 and one of {', '.join(LANGUAGES)}")
    words = _WORDS[language].split()
    if number < 20:
        return words[number]
    tens, ones = divmod(number, 10)
    stem = _TENS[language].split()[tens - 2]
    join = {"en": _english, "fr": _french, "it": _italian, "de": _german, "es": _spanish}[language]
    return join(stem, tens, ones, words)


def _english(stem: str, _: int, ones: int, words: list[str]) -> str:
    return f"{stem}-{words[ones]}" if ones else stem


def _french(stem: str, tens: int, ones: int, words: list[str]) -> str:
    if tens in (7, 9):
        ones += 10
    if tens == 8 and not ones:
        return "quatre-vingts"
    if not ones:
        return stem
    return f"{stem} et {words[ones]}" if ones in (1, 11) and tens < 8 else f"{stem}-{words[ones]}"


def _italian(stem: str, _: int, ones: int, words: list[str]) -> str:
    if ones in (1, 8):
        stem = stem[:-1]
    return stem + ("tré" if ones == 3 else words[ones] if ones else "")


def _german(stem: str, _: int, ones: int, words: list[str]) -> str:
    unit = "ein" if ones == 1 else words[ones]
    return f"{unit}und{stem}" if ones else stem


def _spanish(stem: str, tens: int, ones: int, words: list[str]) -> str:
    if tens > 2:
        return f"{stem} y {words[ones]}" if ones else stem
    unit = {2: "dós", 3: "trés", 6: "séis"}.get(ones, words[ones])
    return f"veinti{unit}" if ones else stem
