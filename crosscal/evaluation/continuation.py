"""Next-words questions: multiple choice made from any corpus, on which even small models score above chance.

A question is the text before a cut in a document. The correct answer is the text after this cut; the wrong answers are
the texts after cuts in other documents of the same corpus, with as many words and nearly as many characters. All
answers are cut in the same way, so only the text before the cut identifies the correct one.
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
"""Wrong answers are sampled from the candidates nearest in length; this many times the number needed."""
LEAST_CUTS = 64
"""Minimum number of cuts held, so that there are wrong answers of similar length."""


@dataclass(frozen=True)
class ContinuationSettings:
    questions: int = 200
    """Maximum number; a small corpus gives fewer."""
    choices: int = 4
    words: int = 20
    """Words of each answer."""
    context_words: int = 64
    """Words before the cut. Evaluation time grows with them."""
    seed: int = 0


@dataclass(frozen=True, order=True)
class ContinuationCut:
    """A cut in a document, sorted by its rank within the document and then by a hash, so that all documents give one
    cut before any gives a second."""

    rank: int
    order: bytes
    document: bytes
    context: str
    following: str


def continuation_questions(texts: Iterable[str], settings: ContinuationSettings) -> list[Question]:
    """Return questions made from texts. The order of the texts does not matter; each is read once, and only as many
    cuts as needed are held.

    Raises `EvaluationError` if too few documents are long enough, or too few differ in how they continue.
    """
    wanted = max(settings.questions, LEAST_CUTS, NEAREST * settings.choices)
    kept = heapq.nsmallest(wanted, (cut for text in texts for cut in _cuts(text, settings, wanted)))
    if not kept:
        raise _too_few(0, settings)
    return [_question(cut, kept, settings) for cut in kept[: settings.questions]]


def _cuts(text: str, settings: ContinuationSettings, most: int) -> Iterator[ContinuationCut]:
    """Yield pieces of a document that do not overlap, each cut in two, in pseudo-random order."""
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
        yield ContinuationCut(rank, order, document, " ".join(context), " ".join(following))


def _question(cut: ContinuationCut, cuts: Sequence[ContinuationCut], settings: ContinuationSettings) -> Question:
    chance = random.Random(cut.order)
    # Equal continuations count once, and not beside the correct answer: no question has two correct ones.
    others = {other.following.casefold(): other for other in cuts if other.document != cut.document}
    others.pop(cut.following.casefold(), None)
    if len(others) < settings.choices - 1:
        raise _too_few(len(others) + 1, settings)
    near = sorted(others.values(), key=lambda o: (abs(len(o.following) - len(cut.following)), o.order))
    choices = [o.following for o in chance.sample(near[: NEAREST * (settings.choices - 1)], settings.choices - 1)]
    answer = chance.randrange(settings.choices)
    choices.insert(answer, cut.following)
    return Question(cut.context, tuple(choices), answer)


def _too_few(found: int, settings: ContinuationSettings) -> EvaluationError:
    length = settings.context_words + settings.words
    return EvaluationError(
        "too few documents for questions on what comes next",
        got=f"{found} continuations of documents of {length} words or more, for {settings.choices} choices",
        do="Add documents, or lower `words`, `context_words` or `choices`.",
    )
