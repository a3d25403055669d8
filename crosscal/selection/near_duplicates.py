"""Near-duplicate documents: MinHash finds candidates, the Jaccard similarity of their word 5-grams decides.

Broder: "On the resemblance and containment of documents", 1997; the sketches and the index are datasketch's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import cast

from datasketch import LeanMinHash, MinHash, MinHashLSH

SHINGLE_WORDS = 5
HASHES = 128
RECALL = 0.99
_SCHEME = "affine32"
_WORDS = re.compile(r"\w+")
Sketch = LeanMinHash


def shingles(text: str) -> frozenset[str]:
    """Return all runs of five words, lower-cased; for a shorter text, all its words as one."""
    words = _WORDS.findall(text.lower())
    if not words:
        return frozenset([text])
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[first : first + SHINGLE_WORDS]) for first in range(last))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    return len(one & other) / len(one | other)


def sketches(texts: Sequence[str]) -> list[Sketch]:
    """Return a MinHash of 128 numbers for each text, the same in every process and on every machine."""
    sets = [[shingle.encode() for shingle in shingles(text)] for text in texts]
    return [LeanMinHash(one) for one in MinHash.generator(sets, num_perm=HASHES, scheme=_SCHEME)]


def bands(threshold: float) -> tuple[int, int]:
    """Return (bands, hashes per band): the most hashes per band that find a pair at the threshold with at least 99 %.

    Two documents of similarity s share a whole band with probability 1 - (1 - s^r)^b. False candidates only cost time,
    because the shingles decide.
    """
    rows = [r for r in range(1, HASHES // 2 + 1) if 1 - (1 - threshold**r) ** (HASHES // r) >= RECALL]
    return HASHES // max(rows, default=1), max(rows, default=1)


class NearDuplicates:
    """Index of numbered documents, queried for near-duplicates of a document."""

    def __init__(self, threshold: float, text_of: Callable[[int], str]) -> None:
        self._index = MinHashLSH(threshold, HASHES, params=bands(threshold))
        self._threshold, self._text_of = threshold, text_of

    def add(self, number: int, sketch: Sketch) -> None:
        self._index.insert(number, sketch)

    def of(self, sketch: Sketch, text: str | Callable[[], str]) -> list[int]:
        """Return the numbers of all candidates with a Jaccard similarity of at least the threshold, ascending."""
        candidates = sorted(cast("list[int]", self._index.query(sketch)))
        if not candidates:
            return []
        mine = shingles(text if isinstance(text, str) else text())
        return [n for n in candidates if jaccard(mine, shingles(self._text_of(n))) >= self._threshold]
