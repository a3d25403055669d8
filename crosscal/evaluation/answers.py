"""Resolve which choice an answer field names: by letter, by number or by text.

One encoding holds for a whole file and must fit every row. A file that counts from 1 is recognised by an answer equal
to the number of choices. If two encodings fit and disagree, the plan must name one (`answer_is`).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.errors import EvaluationError
from crosscal.files import excerpt

LETTER, TEXT, FROM_0, FROM_1 = "letter", "text", "number_from_0", "number_from_1"
TOLD = {LETTER: "by its letter", TEXT: "in words", FROM_0: "by its number from 0", FROM_1: "by its number from 1"}
YES = {True: ("yes", "true"), False: ("no", "false")}


@dataclass(frozen=True)
class AnswerRow:
    """The part of a row that is needed to resolve its answer."""

    choices: tuple[str, ...]
    labels: tuple[str, ...] | None
    """Labels of the choices in the file; None: A, B, C, …"""
    answer: Any
    where: str


def read_answers(
    rows: Sequence[AnswerRow], field: str, answer_is: str | None, *, native: bool = False
) -> tuple[list[int], str]:
    """Return the index of the correct choice of every row, and the encoding of the answers.

    `field`: name of the answer field. `native`: integers are known to count from 0. If rows have labels and every
    answer is one of them, labels take precedence. Raises `EvaluationError` naming the first row that cannot be read or
    is ambiguous.
    """
    if answer_is is None:
        fitting = {way: found for way in _ways(rows, native=native) if None not in (found := _read(rows, way))}
        if rows[0].labels is not None and LETTER in fitting:  # the file's own labels take precedence
            fitting = {LETTER: fitting[LETTER]}
        _check_one_meaning(rows, field, fitting)
        answer_is = next(iter(fitting), _way_of(rows[0].answer))
    found = _read(rows, answer_is)
    for row, index in zip(rows, found, strict=True):
        if index is None:
            counted_from_1 = answer_is == FROM_0 and None not in _read(rows, FROM_1)
            remedy = (
                "If they count from 1, state it in the plan: " if counted_from_1 else "Fix it, or state in the plan "
            )
            remedy += "`fields: {answer_is: number_from_1}`." if counted_from_1 else "what answers are (`answer_is`)."
            raise EvaluationError(_problem(field, row, answer_is), where=row.where, got=_shown(row.answer), do=remedy)
    return [index for index in found if index is not None], answer_is


def _ways(rows: Sequence[AnswerRow], *, native: bool) -> list[str]:
    is_number = all(isinstance(row.answer, int) and not isinstance(row.answer, bool) for row in rows)
    return [FROM_0] if native and is_number else list(READERS)


def _read(rows: Sequence[AnswerRow], way: str) -> list[int | None]:
    return [READERS[way](row) for row in rows]


def _check_one_meaning(rows: Sequence[AnswerRow], field: str, fitting: dict[str, list[int | None]]) -> None:
    """Raise `EvaluationError` if two encodings that fit every row name different choices."""
    (first, one), *others = fitting.items() if fitting else [("", [])]
    for way, other in others:
        for row, a, b in zip(rows, one, other, strict=True):
            if a != b and a is not None and b is not None:
                raise EvaluationError(
                    f"{field} can be read in two ways",
                    where=row.where,
                    got=f"{_shown(row.answer)}: {TOLD[first]} {_shown(row.choices[a])}, "
                    f"{TOLD[way]} {_shown(row.choices[b])}",
                    do=f"Say which in the plan: `fields: {{answer_is: {first}}}` or `{way}`.",
                )


def _by_letter(row: AnswerRow) -> int | None:
    """Match the file's labels, or A, B, C; "(B)" and "b." match B as well."""
    labels = row.labels or tuple(string.ascii_uppercase[: len(row.choices)])
    if isinstance(row.answer, bool) or not isinstance(row.answer, str | int):
        return None
    wanted = str(row.answer).strip(" ().:").casefold()
    found = [index for index, label in enumerate(labels) if label.strip(" ().:").casefold() == wanted]
    return found[0] if len(found) == 1 else None


def _by_text(row: AnswerRow) -> int | None:
    """Match the text of exactly one choice; true matches yes or true, false matches no or false."""
    if not isinstance(row.answer, str | bool):
        return None
    wanted = YES[row.answer] if isinstance(row.answer, bool) else (row.answer.strip(),)
    same = [index for index, choice in enumerate(row.choices) if choice.strip() in wanted]
    if not same:
        folded = [each.casefold() for each in wanted]
        same = [index for index, choice in enumerate(row.choices) if choice.strip().casefold() in folded]
    return same[0] if len(same) == 1 else None


def _by_number(row: AnswerRow, first: int) -> int | None:
    """Accept integers, also as text or as floats without a fraction, as tables hold them."""
    answer = row.answer
    if isinstance(answer, str) and answer.strip().isascii() and answer.strip().isdigit():
        answer = int(answer.strip())
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if type(answer) is not int:  # True is an int too, but not a number
        return None
    return answer - first if 0 <= answer - first < len(row.choices) else None


READERS: dict[str, Callable[[AnswerRow], int | None]] = {
    LETTER: _by_letter,
    TEXT: _by_text,
    FROM_0: lambda row: _by_number(row, 0),
    FROM_1: lambda row: _by_number(row, 1),
}


def _way_of(answer: Any) -> str:
    """Guess the intended encoding of an answer that cannot be read, for the error message."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return FROM_0
    text = answer.strip(" ().:") if isinstance(answer, str) else ""
    return FROM_0 if text.isdigit() else LETTER if len(text) == 1 else TEXT


def _problem(field: str, row: AnswerRow, way: str) -> str:
    count = len(row.choices)
    if way in (FROM_0, FROM_1):
        return f"{field} is not an index into the {count} choices, counted from {way[-1]}"
    if way == LETTER:
        return f"{field} is not the letter of one of the {count} choices"
    return f"{field} is not one of the {count} choices"


def _shown(value: Any) -> str:
    return excerpt(repr(value))[:60]
