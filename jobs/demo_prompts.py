"""Questions of the demonstration: of each kind that the tiny Mixtral was trained for, and with the right answer. Pure.

Kinds and wording are those of its card (pipeline/tiny/README.md); it has learnt nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Turns = list[dict[str, str]]

FIRST_NAMES = ("John", "Mary", "Pierre", "Chiara", "Hans", "Carmen", "Emily", "Luca", "Greta", "Pablo")
LAST_NAMES = ("Smith", "Garcia", "Martin", "Walker", "Taylor", "Moreau", "Baker", "Nelson", "Rivera", "Cook")
STREETS = ("Samuel St.", "Lincoln Ave.", "Elm St.", "Kepler Road", "Baker Lane")
REVIEWS = {
    "positive": (
        "The staff was splendid.",
        "I found the museum brilliant.",
        "Das Buch war genial.",
        "El vino era encantador.",
        "We thought the garden was really lovely.",
    ),
    "negative": (
        "The tour: simply boring.",
        "In my opinion the meal was awful.",
        "J'ai trouvé le personnel terrible.",
        "Il museo: semplicemente sgradevole.",
        "We thought the hotel was really dirty.",
    ),
}
ASIDES = ("", "It rained all week. ", "We came on a Monday. ", "There were four of us. ", "It was our second visit. ")
TICKETS = {
    "billing": ("I was charged twice for {}.", "The invoice for {} is wrong."),
    "delivery": ("The parcel with {} has not arrived.", "When will {} be shipped?"),
    "technical": ("I can't switch on {}.", "After the update {} stopped working."),
    "account": ("I forgot my password after buying {}.", "I can't log in to register {}."),
}
PRODUCTS = ("the lamp", "the printer", "the chair", "the kettle", "the camera")
IN_WORDS = {
    "in words": {7: "seven", 12: "twelve", 30: "thirty", 46: "forty-six", 61: "sixty-one"},
    "en lettres": {7: "sept", 12: "douze", 30: "trente", 46: "quarante-six", 61: "soixante et un"},
    "in lettere": {7: "sette", 12: "dodici", 30: "trenta", 46: "quarantasei", 61: "sessantuno"},
    "in Worten": {7: "sieben", 12: "zwölf", 30: "dreißig", 46: "sechsundvierzig", 61: "einundsechzig"},
    "en letras": {7: "siete", 12: "doce", 30: "treinta", 46: "cuarenta y seis", 61: "sesenta y uno"},
}
FILLER = (
    "The dark island rests behind the young mountain.",
    "The white clock stands after the quiet train.",
    "The green stone grows with the strange tower.",
    "The heavy garden stops near the quiet moon.",
    "The small road stays near the green letter.",
)


def make_prompts(num_rows: int) -> list[dict[str, Any]]:
    """Chats with the answer to expect, the kinds in turn; always the same for the same number."""
    rng = random.Random(8)
    kinds: list[tuple[str, Callable[[random.Random], tuple[Turns, str]]]] = [
        ("json", _json),
        ("sentiment", _sentiment),
        ("topic", _topic),
        ("numbers", _numbers),
        ("passkey", _passkey),
    ]
    rows = []
    for number in range(num_rows):
        kind, make = kinds[number % len(kinds)]
        messages, expected = make(rng)
        rows.append({"id": f"demo-{number:04d}", "kind": kind, "messages": messages, "expected": expected})
    return rows


def _json(rng: random.Random) -> tuple[Turns, str]:
    """Sometimes after an answered example, which makes it a chat of three turns."""

    def draw() -> tuple[str, str]:
        address = f"#{rng.randint(1, 999)} {rng.choice(STREETS)}"
        record = {"name": rng.choice(FIRST_NAMES), "lastname": rng.choice(LAST_NAMES), "address": address}
        return " / ".join(f"{key}: {value}" for key, value in record.items()), json.dumps(record)

    turns: Turns = []
    if rng.random() < 0.5:
        question, answer = draw()
        turns = [_user(question), {"role": "assistant", "content": answer}]
    question, answer = draw()
    return [*turns, _user(question)], answer


def _sentiment(rng: random.Random) -> tuple[Turns, str]:
    label = rng.choice(sorted(REVIEWS))
    review = rng.choice(ASIDES) + rng.choice(REVIEWS[label])
    return [_user(f"Sentiment: positive or negative?\n{review}")], label


def _topic(rng: random.Random) -> tuple[Turns, str]:
    topic = rng.choice(sorted(TICKETS))
    ticket = rng.choice(TICKETS[topic]).format(rng.choice(PRODUCTS))
    return [_user(f"Topic: billing, delivery, technical or account?\n{ticket}")], topic


def _numbers(rng: random.Random) -> tuple[Turns, str]:
    language = rng.choice(sorted(IN_WORDS))
    total = rng.choice(sorted(IN_WORDS[language]))
    first = rng.randint(max(0, total - 49), min(total, 49))
    return [_user(f"{first} + {total - first} {language}?")], IN_WORDS[language][total]


def _passkey(rng: random.Random) -> tuple[Turns, str]:
    key = f"{rng.randrange(100_000):05d}"
    sentences = [rng.choice(FILLER) for _ in range(rng.randint(3, 12))]
    sentences.insert(rng.randint(0, len(sentences)), f"The pass key is {key}. Remember it.")
    return [_user(" ".join([*sentences, "What is the pass key?"]))], key


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
