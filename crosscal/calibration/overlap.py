"""Overlap of evaluation text with calibration text: the share of words in common 13-grams.

A word is covered if it is in an n-gram of words that some calibration document contains as well; n-grams of more than
ten calibration documents are ignored as boilerplate, as in GPT-3 (arXiv 2005.14165, appendix C). A document leaks if at
least 80 % of its words are covered, the criterion by which Llama 2 calls a sample contaminated (arXiv 2307.09288,
section A.6). In the three corpora of the test bed, split by document and without near-duplicates, the largest share of
any document is 63 % (`benchmarks/sufficiency.py`).

Evaluation text is the smaller side: its n-grams are held in memory, about `MOST_NGRAMS` at a time, while calibration
text is streamed.

Shapes: N n-grams of evaluation documents, K different ones, M n-grams of some calibration documents, D documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from crosscal.calibration.ngrams import NGRAM_WORDS, Ngrams, ngrams_of

LEAK_SHARE = 0.8
"""Covered share of the words from which on an evaluation document leaks."""
MOST_DOCUMENTS = 10
"""An n-gram found in more calibration documents than this does not count."""
MOST_NGRAMS = 1 << 22
"""N-grams of evaluation text held at a time (about 25 MB of text); calibration text is read once per such part."""
MOST_NAMED = 10
SHOWN_CHARACTERS = 80
BATCH_CHARACTERS = 1 << 18
TABLE_FACTOR = 16

Named = tuple[str, str]
"""(name of the set or corpus, text of one of its documents)."""


@dataclass(frozen=True)
class DocumentOverlap:
    """An evaluation document that shares n-grams with calibration text."""

    number: int
    """Position in its set, from 0."""
    share: float
    """Covered share of its words."""
    begins: str
    found_in: str
    """Corpus of the calibration document that was the first to contain most of its shared n-grams."""
    found_begins: str


@dataclass(frozen=True)
class SetOverlap:
    """Overlap of one evaluation set with calibration text."""

    name: str
    documents: int = 0
    too_short: int = 0
    """Documents with fewer words than an n-gram: not compared."""
    words: int = 0
    covered_words: int = 0
    leaked: int = 0
    """Documents of whose words at least `LEAK_SHARE` are covered."""
    largest: tuple[DocumentOverlap, ...] = ()
    """The documents with the largest shares."""

    @property
    def share(self) -> float:
        return self.covered_words / self.words if self.words else 0.0

    def plus(self, other: SetOverlap) -> SetOverlap:
        """Return the overlap of two parts of one set together."""
        ranked = sorted((*self.largest, *other.largest), key=lambda each: (-each.share, each.number))
        return SetOverlap(
            self.name,
            self.documents + other.documents,
            self.too_short + other.too_short,
            self.words + other.words,
            self.covered_words + other.covered_words,
            self.leaked + other.leaked,
            tuple(ranked[:MOST_NAMED]),
        )


def overlaps(
    evaluation: Iterable[Named],
    calibration: Callable[[], Iterable[Named]],
    *,
    own: Collection[str] = (),
    n: int = NGRAM_WORDS,
    leak_share: float = LEAK_SHARE,
    most_documents: int = MOST_DOCUMENTS,
    most_ngrams: int = MOST_NGRAMS,
) -> list[SetOverlap]:
    """Return the overlap of every evaluation set, in the order of their first documents.

    `own`: sets whose texts are themselves among the calibration documents; they are compared only with the others.
    The result for a document does not depend on the order of the documents on either side, except for which calibration
    document is named.
    """
    found: dict[str, SetOverlap] = {}
    numbers: dict[str, int] = {}
    for part in _parts(evaluation, numbers, n, most_ngrams):
        part.look_in(calibration(), n)
        for one in part.compared(own, n, leak_share, most_documents):
            found[one.name] = found.get(one.name, SetOverlap(one.name)).plus(one)
    return list(found.values())


@dataclass(eq=False)
class _Part:
    """Evaluation documents, and counts of their n-grams in calibration text, set by `look_in` alone."""

    names: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    begins: list[str] = field(default_factory=list)
    ngrams: list[Ngrams] = field(default_factory=list)
    sources: list[Named] = field(default_factory=list)
    """(corpus, beginning) of calibration documents that were the first to contain some n-gram."""

    def look_in(self, calibration: Iterable[Named], n: int) -> None:
        """Count for each n-gram the calibration documents that contain it, and record the first."""
        hash_N = np.concatenate([each.hash_N for each in self.ngrams])
        self.key_K, self.of_N = np.unique(hash_N, return_inverse=True)
        self.documents_K = np.zeros(len(self.key_K), np.int64)
        self.source_K = np.full(len(self.key_K), -1, np.int64)
        shift = np.uint64(64 - max(4, (TABLE_FACTOR * max(1, len(self.key_K)) - 1).bit_length()))
        table = np.zeros(1 << (64 - int(shift)), bool)
        table[self.key_K >> shift] = True
        for batch in _batches(calibration):
            ngrams = ngrams_of([text for _, text in batch], n)
            likely_M = np.flatnonzero(table[ngrams.hash_N >> shift])
            if len(likely_M):
                self._count(batch, ngrams.hash_N[likely_M], ngrams.document_N[likely_M])

    def _count(self, batch: Sequence[Named], hash_M: np.ndarray, document_M: np.ndarray) -> None:
        place_M = np.minimum(np.searchsorted(self.key_K, hash_M), len(self.key_K) - 1)
        here_M = self.key_K[place_M] == hash_M
        pairs = np.unique(place_M[here_M] * len(batch) + document_M[here_M])
        place, document = np.divmod(pairs, len(batch))
        np.add.at(self.documents_K, place, 1)
        place, first = np.unique(place, return_index=True)
        is_new = self.source_K[place] < 0
        for number in np.unique(document[first[is_new]]):
            mine = is_new & (document[first] == number)
            self.source_K[place[mine]] = len(self.sources)
            self.sources.append((batch[number][0], _beginning(batch[number][1])))

    def compared(self, own: Collection[str], n: int, leak_share: float, most_documents: int) -> Iterator[SetOverlap]:
        """Yield the overlap of every single document."""
        document_N = _documents_of(self.ngrams)
        words_D = np.concatenate([each.words for each in self.ngrams])
        starts_D = np.searchsorted(document_N, np.arange(len(words_D) + 1))
        for place, words in enumerate(words_D.tolist()):
            of_n = self.of_N[starts_D[place] : starts_D[place + 1]]
            if not len(of_n):
                yield SetOverlap(self.names[place], documents=1, too_short=1)
                continue
            others = self.documents_K[of_n] - (self.names[place] in own)
            met = np.flatnonzero((others > 0) & (others <= most_documents))
            covered = _covered(met, words, n)
            whole = SetOverlap(self.names[place], 1, 0, words, covered, int(covered / words >= leak_share))
            if covered:
                corpus, begins = self.sources[int(np.bincount(self.source_K[of_n[met]]).argmax())]
                named = self.numbers[place], covered / words, self.begins[place], corpus, begins
                whole = replace(whole, largest=(DocumentOverlap(*named),))
            yield whole


def _parts(evaluation: Iterable[Named], numbers: dict[str, int], n: int, most_ngrams: int) -> Iterator[_Part]:
    part, held = _Part(), 0
    for batch in _batches(evaluation):
        ngrams = ngrams_of([text for _, text in batch], n)
        if held and held + len(ngrams.hash_N) > most_ngrams:
            yield part
            part, held = _Part(), 0
        held += len(ngrams.hash_N)
        part.ngrams.append(ngrams)
        for name, text in batch:
            part.names.append(name)
            part.begins.append(_beginning(text))
            part.numbers.append(numbers.get(name, 0))
            numbers[name] = numbers.get(name, 0) + 1
    if part.names:
        yield part


def _batches(documents: Iterable[Named]) -> Iterator[list[Named]]:
    """Yield batches of at least one document, closed once they have `BATCH_CHARACTERS` characters."""
    batch: list[Named] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _covered(met: np.ndarray, words: int, n: int) -> int:
    """Return the number of words in n-grams that begin at the positions `met`."""
    change = np.zeros(words + 1, np.int64)
    np.add.at(change, met, 1)
    np.add.at(change, met + n, -1)
    return int(np.count_nonzero(np.cumsum(change)))


def _documents_of(parts: Sequence[Ngrams]) -> np.ndarray:
    before = itertools.accumulate((len(each.words) for each in parts), initial=0)
    return np.concatenate([each.document_N + start for each, start in zip(parts, before, strict=False)])


def _beginning(text: str) -> str:
    shown = " ".join(text[: 4 * SHOWN_CHARACTERS].split())
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]} …"
