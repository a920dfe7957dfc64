"""Fixed answers as the token ids that a model was trained to give them: in the assistant's turn, up to its end."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.chat_encoder import ChatEncoder
from pipeline.choices import ChoiceTree, Ids
from pipeline.errors import RowError, SpecError
from pipeline.prompts import Message
from pipeline.yes_or_no import yes_or_no

MAX_RIVALS = 128
"""Most tokens whose probabilities vLLM returns for one position (its MAX_LOGPROB_TOKEN_IDS)."""
_QUESTION, _NEXT = Message("user", "a"), Message("user", "b")


def choice_tree(encoder: ChatEncoder, choices: Sequence[str]) -> ChoiceTree:
    """The choices as this model's tokens.

    Raises:
        SpecError: two choices can't be told apart, or the model's template has no plain place for an answer.
    """
    try:
        tree = ChoiceTree(tuple(_answer_ids(encoder, choice) for choice in choices))
    except (ValueError, RowError) as error:
        raise _refused(error) from error
    most = max(len(question.tokens) for question in tree.questions)
    if most > MAX_RIVALS:
        raise SpecError(
            f"label.choices: {most} choices begin alike and then differ in one token, which is more than the "
            f"{MAX_RIVALS} that vLLM can compare; rename some, or label in two steps"
        )
    return tree


def yes_no_tree(encoder: ChatEncoder, choices: Sequence[str]) -> ChoiceTree:
    """A yes and a no about each of the choices, see `multi_labels`: all that the two share is taken as said.

    Raises:
        SpecError: as `choice_tree`.
    """
    answers: list[Ids] = []
    said: list[int] = []
    try:
        for choice in choices:
            # Neither is the beginning of the other, so what follows them, the end or another line, doesn't matter.
            yes, no = (_answer_ids(encoder, answer)[:-1] for answer in yes_or_no(choice))
            answers += [yes, no]
            said += [next(place for place, pair in enumerate(zip(yes, no, strict=False)) if pair[0] != pair[1])] * 2
        return ChoiceTree(tuple(answers), tuple(said))
    except (ValueError, RowError, StopIteration) as error:
        raise _refused(error) from error


def _refused(error: Exception) -> SpecError:
    why = "the model's tokens for yes are the beginning of those for no" if isinstance(error, StopIteration) else error
    return SpecError(f"label.choices: {why}; rename a choice, or use a model with a plainer template")


def _answer_ids(encoder: ChatEncoder, choice: str) -> Ids:
    """Tokens of a past answer in a longer chat: what lies between the question's last token and the answer's end."""
    before = encoder.encode([_QUESTION]).ids
    chat = encoder.encode([_QUESTION, Message("assistant", choice), _NEXT])
    if chat.repairs:
        raise ValueError(f"{choice!r} holds the model's own markers ({', '.join(chat.repairs)})")
    answer = chat.ids[len(before) :]
    if chat.ids[: len(before)] != before or encoder.end_id not in answer:
        raise ValueError("the model's template writes past answers in another way than it asks for new ones")
    return tuple(answer[: answer.index(encoder.end_id) + 1])
