"""Multiple choice: the log-likelihood of each choice given its question, whose tokens are processed once.

The questions of a batch share a prefix length P: the tokens of the shortest question minus one. The first P tokens of
each question are processed together and cached (keys and values, or whatever the model family caches). One row per
choice then continues from the cache: the rest of the question, and the choice without its last token. Equal rows are
processed once, e.g. those of one-token choices. Rows are padded at the end, which no scored position depends on, so no
mask is needed and every family with a generation cache is supported. If a family has no cache, or gives other results
with it, every row is processed whole.

Shapes: Q questions, P tokens read together, N rows, R tokens in a row, T scored tokens.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscal.errors import EvaluationError
from crosscal.evaluation.batches import Batch
from crosscal.evaluation.encoded import EncodedQuestion
from crosscal.evaluation.logits import NOT_SUPPORTED, ROUNDOFF, LogitReader
from crosscal.evaluation.measurement import TEST, Measurement
from crosscal.evaluation.summaries import spread

PASS_TOKENS = 64
"""Fixed cost of a forward pass, in tokens."""
CACHE_BYTES = 2**28
"""Maximum bytes of cached question states, including the copies per choice (or those that one row needs)."""
Scores = list[tuple[float, ...]]
"""Per question, the log-likelihood of each choice."""


@dataclass(frozen=True, eq=False)
class Choices:
    """Questions of one task. `acc` is the share whose correct choice has the highest log-likelihood, `acc_norm` the
    share where it is the highest per character; ties go to the first choice. stderr = sd / sqrt(Q)."""

    name: str
    questions: Sequence[EncodedQuestion]

    @property
    def items(self) -> int:
        return len(self.questions)

    @property
    def longest(self) -> list[int]:
        return list(max(self.questions, key=lambda one: len(one.context)).context)

    def check(self, model: Any) -> None:
        vocabulary = model.get_input_embeddings().num_embeddings
        largest = max(max((*one.context, *map(max, one.choices))) for one in self.questions)
        if largest >= vocabulary:
            raise EvaluationError(
                "token ids outside the model's vocabulary",
                where=self.name,
                got=f"{largest}, {vocabulary} embeddings",
                do="Use the tokenizer that belongs to the model.",
            )

    def batches(self, reader: LogitReader, batch_tokens: int) -> list[Batch]:
        with torch.inference_mode():
            shared = reader.is_in_pieces and is_shared(reader, max(self.questions, key=_context_tokens))
        found: list[Batch] = []
        for numbers in grouped(self.questions, batch_tokens if reader.is_in_pieces else 1, shared=shared):
            asked = [self.questions[number] for number in numbers]
            found.append((len(asked), partial(_numbered, numbers, partial(scores, reader, asked, shared=shared))))
        return found

    def result(self, answers: list[dict[int, tuple[float, ...]]], seconds: float) -> list[Measurement]:
        by_number = {number: found for answer in answers for number, found in answer.items()}
        ordered = [by_number[number] for number in range(len(self.questions))]
        right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
        for number, (question, found) in enumerate(zip(self.questions, ordered, strict=True)):
            if not all(map(math.isfinite, found)):
                raise EvaluationError(
                    "the log-likelihood of a choice is not finite",
                    where=f"{self.name}, question {number}",
                    do="The weights of this model are damaged: compress it less, or raise the damping.",
                )
            by_length = list(map(operator.truediv, found, question.characters))
            right["acc"].append(found.index(max(found)) == question.answer)
            right["acc_norm"].append(by_length.index(max(by_length)) == question.answer)
        tokens = sum(one.tokens for one in self.questions)
        return [self._measured(metric, correct, tokens, seconds) for metric, correct in right.items()]

    def _measured(self, metric: str, correct: list[bool], tokens: int, seconds: float) -> Measurement:
        found = spread(map(float, correct))
        stderr = None if found.sd is None else found.sd / math.sqrt(found.n)
        return Measurement(
            self.name, TEST, metric, found.mean, stderr, tokens, seconds, question_correct=tuple(correct)
        )


def is_shared(reader: LogitReader, question: EncodedQuestion) -> bool:
    """Return whether scoring from a cached question gives the same result, tested on its first choice."""
    alone = EncodedQuestion(question.context, question.choices[:1], question.characters[:1], 0)
    if len(alone.context) < 2:
        return False
    whole = scores(reader, [alone], shared=False)[0][0]
    try:
        found = scores(reader, [alone], shared=True)[0][0]
    except NOT_SUPPORTED:
        return False
    return math.isclose(found, whole, rel_tol=ROUNDOFF) or math.isnan(whole)


def grouped(questions: Sequence[EncodedQuestion], batch_tokens: int, *, shared: bool) -> list[list[int]]:
    """Return batches of question indices, the longest first: each has at most `batch_tokens` tokens (or one question),
    and a question joins a batch only if that costs no more than a batch of its own."""
    left = sorted(range(len(questions)), key=lambda number: -_context_tokens(questions[number]))
    groups: list[list[int]] = []
    now: list[int] = []
    for number in left:
        together = _pass_tokens([questions[each] for each in (*now, number)], shared)
        apart = sum(_pass_tokens([questions[each] for each in some], shared) for some in (now, [number]) if some)
        if now and together <= min(batch_tokens, apart + 2 * PASS_TOKENS):
            now.append(number)
        else:
            now = [number]
            groups.append(now)
    return groups


def _pass_tokens(questions: Sequence[EncodedQuestion], shared: bool) -> int:
    """Tokens processed for a batch of questions, padding included."""
    together = _together(questions) if shared else 0
    row = max(_context_tokens(one) - together + max(map(len, one.choices)) - 1 for one in questions)
    return len(questions) * together + sum(len(one.choices) for one in questions) * row


def _together(questions: Sequence[EncodedQuestion]) -> int:
    return min(map(_context_tokens, questions)) - 1


def _context_tokens(question: EncodedQuestion) -> int:
    return len(question.context)


def _numbered(numbers: Sequence[int], run: Any) -> dict[int, tuple[float, ...]]:
    return dict(zip(numbers, run(), strict=True))


class _Row(NamedTuple):
    """A sequence that continues from the cache of its question."""

    question: int
    tokens: tuple[int, ...]


class _Place(NamedTuple):
    """The position that predicts a choice's first token."""

    row: int
    position: int
    choice: tuple[int, ...]


def scores(reader: LogitReader, questions: Sequence[EncodedQuestion], *, shared: bool) -> Scores:
    """Return the log-likelihood of each choice: the sum over its tokens, each given all tokens before it."""
    together = _together(questions) if shared else 0
    rows: dict[_Row, int] = {}
    places: list[_Place] = []
    for number, question in enumerate(questions):
        for choice in question.choices:
            row = rows.setdefault(_Row(number, question.context[together:] + choice[:-1]), len(rows))
            places.append(_Place(row, len(question.context) - together - 1, choice))
    cache = None
    if together:
        front_QP = torch.tensor([one.context[:together] for one in questions]).to(reader.device)
        cache = reader.read(front_QP, keep=True).cache
    each = iter(_likelihoods(reader, list(rows), places, cache))
    return [tuple(next(each) for _ in question.choices) for question in questions]


def _likelihoods(reader: LogitReader, rows: Sequence[_Row], places: Sequence[_Place], cache: Any) -> list[float]:
    """Log-likelihood at each place; at most as many rows at once as there is memory for copies of the cache."""
    found = [0.0] * len(places)
    at_once = _rows_at_once(reader, cache, rows)
    for start in range(0, len(rows), at_once):
        chunk = rows[start : start + at_once]
        behind = cache
        if cache is not None:
            is_last = start + at_once >= len(rows)
            behind = cache if is_last else copy.deepcopy(cache)  # a forward pass extends it
            behind.reorder_cache(torch.tensor([row.question for row in chunk]).to(reader.device))
        mine = [number for number, place in enumerate(places) if start <= place.row < start + at_once]
        inside = [places[number]._replace(row=places[number].row - start) for number in mine]
        for number, value in zip(mine, _sums(reader, chunk, inside, behind), strict=True):
            found[number] = value
    return found


def _sums(reader: LogitReader, rows: Sequence[_Row], places: Sequence[_Place], cache: Any) -> list[float]:
    width = max(len(row.tokens) for row in rows)
    rows_NR = torch.tensor([(*row.tokens, *[0] * (width - len(row.tokens))) for row in rows]).to(reader.device)
    at = [place.row * width + place.position + i for place in places for i in range(len(place.choice))]
    targets = [token for place in places for token in place.choice]
    of_T = torch.tensor([number for number, place in enumerate(places) for _ in place.choice])
    at_T, target_T = (torch.tensor(each).to(reader.device) for each in (at, targets))
    nll_T = reader.nll(reader.read(rows_NR, cache), at_T, target_T)
    return torch.zeros(len(places), dtype=torch.float64).index_add_(0, of_T, -nll_T.double().cpu()).tolist()


def _rows_at_once(reader: LogitReader, cache: Any, rows: Sequence[_Row]) -> int:
    if cache is None:
        return len(rows) if reader.is_in_pieces else 1
    kept = [each for layer in cache.layers for each in vars(layer).values() if isinstance(each, Tensor)]
    a_question = sum(each.nbytes for each in kept) // len({row.question for row in rows})
    return max(1, min(len(rows), CACHE_BYTES // reader.lanes // max(1, a_question)))
