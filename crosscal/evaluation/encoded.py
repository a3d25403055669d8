"""Questions as token ids, encoded once for all models of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.errors import EvaluationError
from crosscal.evaluation.question_files import Question

_log = logging.getLogger(__name__)
DELIMITER = " "
"""Text between a question and a choice."""


@dataclass(frozen=True)
class EncodedQuestion:
    context: tuple[int, ...]
    """Token ids of the question, at least one."""
    choices: tuple[tuple[int, ...], ...]
    """Token ids that each choice adds."""
    characters: tuple[int, ...]
    """Length of each choice in characters."""
    answer: int

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(map(len, self.choices))


def encoded(questions: Sequence[Question], tokenizer: Any, *, name: str, max_length: int) -> list[EncodedQuestion]:
    """Encode as lm-eval does: question, space and choice as one text, from which the question's tokens are removed;
    trailing spaces of a question belong to the choices.

    A question that does not fit in `max_length` tokens with its longest choice, whose last token is only predicted,
    loses tokens at its beginning (but not beginning-of-text), equally for all its choices (lm-eval: per choice); a
    warning counts the prompts. Raises `EvaluationError` for a choice longer than `max_length` or without a token of its
    own.
    """
    contexts = [question.question.rstrip() for question in questions]
    wholes = [f"{one.question}{DELIMITER}{choice}" for one in questions for choice in one.choices]
    context_ids, whole_ids = _ids(tokenizer, contexts), iter(_ids(tokenizer, wholes))
    found, cut = [], 0
    for number, (question, context) in enumerate(zip(questions, context_ids, strict=True)):
        choices = tuple(tuple(next(whole_ids)[len(context) :]) for _ in question.choices)
        longest = max(map(len, choices))
        if longest > max_length or not all(choices):
            what = "is longer than the model's window" if longest > max_length else "has no token of its own"
            got, where = f"{longest} tokens for a window of {max_length}", f"{name}, question {number}"
            raise EvaluationError(f"an answer {what}", where=where, got=got, do="Leave the question out.")
        room = max_length + 1 - longest
        cut += len(choices) if len(context) > room else 0
        shortened = _shortened(context, room, tokenizer.bos_token_id)
        found.append(EncodedQuestion(shortened, choices, tuple(map(len, question.choices)), question.answer))
    if cut:
        _log.warning("%s: %d of %d prompts lose their beginning to fit %d tokens", name, cut, len(wholes), max_length)
    return found


def _shortened(context: Sequence[int], room: int, begin: int | None) -> tuple[int, ...]:
    if len(context) <= room:
        return tuple(context)
    front = context[:1] if context[0] == begin and room > 1 else []
    return (*front, *context[len(context) - room + len(front) :])


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids with the tokenizer's default special tokens; without them where the text begins with the first of
    these."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    begin = None if first is None else tokenizer.decode([first])
    found: Any = tokenizer(list(texts), truncation=False, verbose=False, return_attention_mask=False)
    ids = found["input_ids"]
    for number in (number for number, text in enumerate(texts) if begin and text.startswith(begin)):
        ids[number] = tokenizer(texts[number], add_special_tokens=False, verbose=False)["input_ids"]
    return ids
