"""SIGINT and SIGTERM of one run: counted always, raised as KeyboardInterrupt unless somebody watches the count.

Knows nothing of what is interrupted. Invariant: an interrupt is never lost. A KeyboardInterrupt alone can be: raised
inside a callback or a finalizer, Python prints it and goes on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """What was heard so far."""

    def __init__(self) -> None:
        self.count = 0
        self._watched = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Hear signals in the block, if this is the main thread: others can't."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def install(self) -> None:
        """Put the handlers in place; again after `ray.init`, which has its own for SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._hear)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Only count in the block, which looks at `count` often."""
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def _hear(self, *_: object) -> None:
        self.count += 1
        if not self._watched:
            raise KeyboardInterrupt
