"""Writes the input of the jobs in jobs/examples/: `python -m tests.example_data`. The same every time.

Tickets and numbers are of what the tiny Mixtral can do (pipeline/tiny/README.md), so each row can carry the answer to
expect. It has never seen these tickets; of the numbers below 100, of which there are a hundred, it has seen all.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.tiny_training.examples import LANGUAGES
from tests.tiny_training.label_task import TOPICS, topic_example
from tests.tiny_training.number_task import IN_WORDS, spell

FOLDER = Path(__file__).parents[1] / "jobs" / "examples"
NAMES = {"en": "English", "fr": "French", "it": "Italian", "de": "German", "es": "Spanish"}

DEVICES = {
    "kettle": ["It holds 1.7 litres.", "It switches itself off when the water boils.", "Descale it once a month."],
    "lamp": ["Its bulb lasts 15,000 hours.", "Touch the foot to dim it.", "It must not stand in a bathroom."],
    "radio": ["It receives FM and DAB.", "The battery plays for 20 hours.", "Hold the red button to store a station."],
    "oven": ["It heats up to 280 degrees.", "The grill works with the door closed.", "Clean the glass with vinegar."],
    "camera": ["It takes 12 pictures a second.", "The memory card goes in below.", "It stays dry down to 5 metres."],
    "bicycle": ["It has 24 gears.", "The chain wants oil every 300 kilometres.", "The saddle is set with a 5 mm key."],
    "printer": [
        "It prints 20 pages a minute.",
        "Paper goes in at the back.",
        "A blinking light means that ink is low.",
    ],
    "mixer": ["It has three speeds.", "The bowl may go into the dishwasher.", "Let it rest after ten minutes."],
}
ASKERS = ["a buyer who compares prices", "a child of ten", "somebody who lost the manual", "a repairer", "a journalist"]


def tickets() -> list[dict[str, Any]]:
    """Two tickets for each topic in each language, with the true topic."""
    rng = random.Random("tickets")
    wanted = [(topic, language) for topic in TOPICS for language in LANGUAGES] * 2
    rng.shuffle(wanted)
    rows = []
    for number, (topic, language) in enumerate(wanted, start=1):
        while (example := topic_example(rng, language, test=True)).answer != topic:
            pass
        lines = example.messages[-1].content.splitlines()
        [body] = [line for line in lines if not line.startswith("Topic:")]
        rows.append({"ticket": f"T-{number:03d}", "language": language, "body": body, "topic": topic})
    return rows


def documents() -> list[dict[str, Any]]:
    """Pages of a manual, one a device."""
    return [
        {"document": f"manual-{number}", "title": f"The {device}", "text": " ".join(facts)}
        for number, (device, facts) in enumerate(DEVICES.items(), start=1)
    ]


def numbers() -> list[dict[str, Any]]:
    """Eight numbers, each to be said in five languages, with what is right."""
    drawn = sorted(random.Random("numbers").sample(range(1, 90), 8))
    return [
        {
            "id": f"{number}-{language}",
            "text": str(number),
            "target": NAMES[language],
            "phrase": IN_WORDS[language],
            "expected": spell(number, language),
        }
        for number in drawn
        for language in LANGUAGES
    ]


def files() -> dict[str, str]:
    """Text of every file of input, by name."""
    tables = {"tickets.jsonl": tickets(), "documents.jsonl": documents(), "numbers.jsonl": numbers()}
    lines = {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for name, rows in tables.items()}
    return {**lines, "askers.txt": "".join(f"{asker}\n" for asker in ASKERS)}


if __name__ == "__main__":
    for file, text in files().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
