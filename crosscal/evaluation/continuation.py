"""Which words come next: multiple choice made of any corpus, above chance even for small models.

A question is the words before a cut in a document, the right answer the words behind it, the others the words behind
cuts in other documents of the same corpus: as many words each, and nearly as many characters. All answers are cut in
the same way, so nothing but the words before them tells which is right.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from crosscal.errors import EvaluationError
from crosscal.evaluation.question_files import Question

NEAREST = 4
"""Wrong answers are drawn among so many times as many of the nearest length as are needed."""
LEAST_CUTS = 64
"""Kept at least, to have wrong answers of about one length."""


@dataclass(frozen=True)
class Settings:
    questions: int = 200
    """There may be fewer, of a corpus too small for as many."""
    choices: int = 4
    words: int = 20
    """Of each answer."""
    context_words: int = 64
    """Before them. Longer ones cost the time that they are longer."""
    seed: int = 0


@dataclass(frozen=True, order=True)
class Cut:
    """Ordered by the number of the document's cuts before it and then by chance, so that few documents give a second
    before all gave one."""

    rank: int
    order: bytes
    document: bytes
    context: str
    following: str


def continuation_questions(texts: Iterable[str], settings: Settings) -> list[Question]:
    """The same for the same texts in any order; they are read once, and only so many cuts as are wanted are held.

    Raises `EvaluationError` where too few documents are long enough, or they go on with the same words.
    """
    wanted = max(settings.questions, LEAST_CUTS, NEAREST * settings.choices)
    kept = heapq.nsmallest(wanted, (cut for text in texts for cut in _cuts(text, settings, wanted)))
    if not kept:
        raise _too_few(0, settings)
    return [_question(cut, kept, settings) for cut in kept[: settings.questions]]


def _cuts(text: str, settings: Settings, most: int) -> Iterator[Cut]:
    """Pieces of a document that do not overlap, each cut in two, in an order of their own."""
    words = text.split()
    length = settings.context_words + settings.words
    count = len(words) // length
    if not count:
        return
    document = hashlib.sha256(text.encode()).digest()
    chance = random.Random(f"{settings.seed} {document.hex()}")
    begin = chance.randrange(len(words) - count * length + 1)
    for rank, number in enumerate(chance.sample(range(count), min(count, most))):
        piece = words[begin + number * length :][:length]
        context, following = piece[: settings.context_words], piece[settings.context_words :]
        order = hashlib.sha256(f"{settings.seed} {number} {document.hex()}".encode()).digest()
        yield Cut(rank, order, document, " ".join(context), " ".join(following))


def _question(cut: Cut, cuts: Sequence[Cut], settings: Settings) -> Question:
    chance = random.Random(cut.order)
    # Cuts that go on with the same words count once, and not beside the right answer: no question has two.
    others = {other.following.casefold(): other for other in cuts if other.document != cut.document}
    others.pop(cut.following.casefold(), None)
    if len(others) < settings.choices - 1:
        raise _too_few(len(others) + 1, settings)
    near = sorted(others.values(), key=lambda o: (abs(len(o.following) - len(cut.following)), o.order))
    choices = [o.following for o in chance.sample(near[: NEAREST * (settings.choices - 1)], settings.choices - 1)]
    answer = chance.randrange(settings.choices)
    choices.insert(answer, cut.following)
    return Question(cut.context, tuple(choices), answer)


def _too_few(found: int, settings: Settings) -> EvaluationError:
    length = settings.context_words + settings.words
    return EvaluationError(
        "too few documents for questions on what comes next",
        got=f"{found} continuations of documents of {length} words or more, for {settings.choices} choices",
        do="Add documents, or lower `words`, `context_words` or `choices`.",
    )
