"""Weights are asked for before the engine is there, if they fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import read_ahead


def test_all_weights_and_nothing_else_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, *where: asked.append((os.readlink(f"/proc/self/fd/{fd}"), where[2]))
    )
    for name, size in (("a.safetensors", 1000), ("b.safetensors", 24), ("config.json", 5)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert read_ahead.read_ahead(str(tmp_path)) == 1024
    assert sorted(asked) == [(str(tmp_path / f"{n}.safetensors"), os.POSIX_FADV_WILLNEED) for n in "ab"]


def test_what_would_not_stay_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setattr(read_ahead, "_available_bytes", lambda: 1999)
    assert read_ahead.read_ahead(str(tmp_path)) == 0
