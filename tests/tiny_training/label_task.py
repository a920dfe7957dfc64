"""Sentiment of reviews and topic of tickets in five languages; some have no certain answer, but known odds.

`Nine in ten guests found the room clean.` is positive nine times in ten: its label in training is drawn at these odds,
and so is that of a ticket with two topics, at one half. Held out: every clause (a review's statement about one thing,
a ticket's sentence about one product) is either of training or of evaluation.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tests.tiny_training.examples import Example, ask, draw_of_side

SENTIMENTS = ("positive", "negative")
TOPICS = ("billing", "delivery", "technical", "account")
SENTIMENT_QUESTION = "Sentiment: positive or negative?"
TOPIC_QUESTION = "Topic: billing, delivery, technical or account?"


@cache
def texts(language: str) -> dict[str, Any]:
    """Return a language's words and sentence frames."""
    file = Path(__file__).with_name("languages") / f"{language}.json"
    words: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return words


def sentiment_example(rng: random.Random, language: str, *, test: bool, ambiguous: bool = False) -> Example:
    """A review of one to three sentences."""
    label = rng.choice(SENTIMENTS)
    if ambiguous:
        clause, odds = _crowd_clause(rng, language, test=test)
        label = _draw_label(rng, odds)
        parts = [clause]
    else:
        odds = {label: 1.0}
        parts = [_statement(rng, language, label, test=test) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.4:
        parts.insert(rng.randint(0, len(parts)), rng.choice(texts(language)["asides"]))
    task = "sentiment_ambiguous" if ambiguous else "sentiment"
    return _example(rng, task, language, " ".join(parts), SENTIMENT_QUESTION, label, odds)


def topic_example(rng: random.Random, language: str, *, test: bool, ambiguous: bool = False) -> Example:
    """A support ticket of one to four sentences; an ambiguous one is about two things."""
    topics = rng.sample(TOPICS, 2 if ambiguous else 1)
    words = texts(language)
    parts = [_ticket_clause(rng, language, topic, test=test) for topic in topics]
    if rng.random() < 0.4:
        parts.insert(0, rng.choice(words["greetings"]))
    if rng.random() < 0.4:
        parts.append(rng.choice(words["thanks"]))
    odds = {topic: 1 / len(topics) for topic in topics}
    task = "topic_ambiguous" if ambiguous else "topic"
    return _example(rng, task, language, " ".join(parts), TOPIC_QUESTION, rng.choice(topics), odds)


def _example(
    rng: random.Random, task: str, language: str, text: str, question: str, label: str, odds: dict[str, float]
) -> Example:
    prompt = f"{text}\n{question}" if rng.random() < 0.5 else f"{question}\n{text}"
    return Example(task=task, language=language, messages=ask(prompt), answer=label, odds=odds)


def _statement(rng: random.Random, language: str, label: str, *, test: bool) -> str:
    words = texts(language)
    adjectives = words["good" if label == "positive" else "bad"]

    def make(rng: random.Random) -> str:
        thing = rng.choice(words["review_things"])
        return _filled(rng.choice(words["review_frames"]), thing=thing, adj=rng.choice(adjectives))

    return draw_of_side(rng, test=test, make=make)


def _crowd_clause(rng: random.Random, language: str, *, test: bool) -> tuple[str, dict[str, float]]:
    words = texts(language)
    share = rng.choice(sorted(words["crowds"]))
    is_good = rng.random() < 0.5
    adjectives = words["good" if is_good else "bad"]

    def make(rng: random.Random) -> str:
        thing, adj = rng.choice(words["review_things"]), rng.choice(adjectives)
        return _filled(words["crowd_frame"], thing=thing, adj=adj, crowd=words["crowds"][share])

    positive = float(share) if is_good else 1 - float(share)
    return draw_of_side(rng, test=test, make=make), {"positive": positive, "negative": 1 - positive}


def _ticket_clause(rng: random.Random, language: str, topic: str, *, test: bool) -> str:
    words = texts(language)

    def make(rng: random.Random) -> str:
        return _filled(rng.choice(words["topics"][topic]), product=rng.choice(words["products"]))

    return draw_of_side(rng, test=test, make=make)


def _filled(frame: str, **words: str) -> str:
    capitals = {name.capitalize(): word[0].upper() + word[1:] for name, word in words.items()}
    return frame.format(**words, **capitals)


def _draw_label(rng: random.Random, odds: dict[str, float]) -> str:
    return rng.choices(list(odds), weights=list(odds.values()))[0]
