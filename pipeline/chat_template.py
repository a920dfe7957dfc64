"""Renders a model's own chat template in a child process that may be killed without harm to anything else.

Model repositories are somebody else's: two nested `range(99999)` would keep the driver busy until it is killed. Knows
nothing of tokens or of what a chat should look like.

Guarantees:
- a chat that runs too long, takes too much memory or kills the child fails alone; the next one is rendered.
- in the dialect "transformers" texts equal those of `apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from pipeline.errors import RowError
from pipeline.jinja_child import ChatDialect
from pipeline.jinja_process import RenderLimits, RenderProcess, crashed
from pipeline.prompts import Message


class ChatTemplate:
    """One chat template, ending in a generation prompt; not thread-safe. Its child starts with the first chat.

    Close it, or drop it, to end the child.
    """

    def __init__(
        self,
        text: str,
        special_tokens: Mapping[str, Any],
        *,
        dialect: ChatDialect,
        limits: RenderLimits | None = None,
    ) -> None:
        self._text = text
        self._special_tokens = dict(special_tokens)
        self._dialect: ChatDialect = dialect
        self._limits = limits or RenderLimits()
        self._child: RenderProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child; a later `render` starts another."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def render(self, messages: Sequence[Message]) -> str:
        """Return the chat's text.

        Raises:
            RowError: kind `template_error` when the template refuses the chat or is broken, `template_timeout`,
                `template_memory` or `template_output_too_big` when it passes a limit, `template_crash`.
        """
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            answer = self._running_child().render_chat(self._special_tokens | {"messages": chat})
        except RowError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise crashed(f"can't be started: {error}") from error
        if isinstance(answer, RowError):
            raise answer
        return answer[0]

    def _running_child(self) -> RenderProcess:
        if self._child is None:
            self._child = RenderProcess([self._text], self._limits, chat=self._dialect)
            self._child.compiled()
        return self._child
