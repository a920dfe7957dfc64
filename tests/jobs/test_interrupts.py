"""Signals are real, sent to this very process; its own handlers are back after each test."""

from __future__ import annotations

import signal

import pytest

from jobs.interrupts import Interrupts


class Swallower:
    """Its finalizer is where the signal arrives: Python prints what is raised there and goes on."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_raise_where_nobody_watches(number: signal.Signals) -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts.heard():
        signal.raise_signal(number)
    assert interrupts.count == 1


def test_interrupts_are_only_counted_where_somebody_watches() -> None:
    interrupts = Interrupts()
    with interrupts.heard():
        with interrupts.watched():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.count == 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_swallows_is_still_counted() -> None:
    interrupts = Interrupts()
    with interrupts.heard():
        swallower: Swallower | None = Swallower()
        swallower = None
        assert swallower is None
        assert interrupts.count == 1


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts().heard():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_handlers_that_somebody_replaced_are_put_back_in_place() -> None:
    interrupts = Interrupts()
    with interrupts.heard():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupts.install()
        with interrupts.watched():
            signal.raise_signal(signal.SIGTERM)
    assert interrupts.count == 1
