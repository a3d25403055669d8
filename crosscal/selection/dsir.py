"""Data selection by importance resampling (DSIR): documents weighted by the likelihood ratio of domain and pool.

Xie, Santurkar, Ma, Liang: "Data selection for language models via importance resampling", NeurIPS 2023,
https://arxiv.org/abs/2302.03169, section 3; buckets, smoothing and minimum length as in the published code.
"""

from __future__ import annotations

# Shapes: N documents, V buckets, F features (n-grams) of a document.
import functools
import hashlib
import itertools
import re
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from crosscal.progress import Report
from crosscal.selection.texts import DocumentTexts

BUCKETS = 10_000
SMOOTHING = 1e-8
MEMO_GRAMS = 2**18
_WORDS = re.compile(r"\w+|[^\w\s]+")


class HashedGrams:
    """Maps lower-cased words and pairs of words to buckets: SHA-256 of the n-gram mod 10,000.

    A word is a run of letters and digits, or of other characters. A pair is two words separated by a space.
    """

    def __init__(self) -> None:
        self._bucket = functools.lru_cache(MEMO_GRAMS)(_bucket)

    def __call__(self, text: str) -> np.ndarray:
        """Return the buckets of all n-grams of a text, words first, uint16 [F]: F = 2 · words - 1, or 0."""
        words = _WORDS.findall(text.lower())
        pairs = (f"{first} {second}" for first, second in itertools.pairwise(words))
        return np.array([*map(self._bucket, words), *map(self._bucket, pairs)], dtype=np.uint16)


def dsir_scores(pool: DocumentTexts, sample: DocumentTexts, report: Report) -> tuple[np.ndarray, np.ndarray]:
    """Return (log importance weights, numbers of words) of the pool's documents: float64 [N], int64 [N].

    log w = Σ_f log(p_sample(f) + 1e-8) - log(p_pool(f) + 1e-8), f over the document's n-grams, p their frequencies in
    all of the sample and all of the pool (the published code stops counting the pool at 10⁹ n-grams). Every document is
    read and hashed once; its features are stored on disk, two bytes each, until the pool's frequencies are known.
    """
    grams = HashedGrams()
    sample_V = np.zeros(BUCKETS, dtype=np.int64)
    for text in sample:
        sample_V += np.bincount(grams(text), minlength=BUCKETS)
    pool_V, sizes = np.zeros(BUCKETS, dtype=np.int64), []
    with tempfile.TemporaryFile(prefix="crosscal-select-") as waiting:
        for text in pool:
            bucket_F = grams(text)
            waiting.write(bucket_F.tobytes())
            sizes.append(len(bucket_F))
            pool_V += np.bincount(bucket_F, minlength=BUCKETS)
            report("hashing the pool", len(sizes), len(pool))
        waiting.seek(0)
        ratio_V = _log_frequency(sample_V) - _log_frequency(pool_V)
        weights = (ratio_V[bucket_F].sum() for bucket_F in _read_back(waiting, sizes))
        weight_N = np.fromiter(weights, dtype=np.float64, count=len(sizes))
    return weight_N, (np.array(sizes, dtype=np.int64) + 1) // 2


def _log_frequency(count_V: np.ndarray) -> np.ndarray:
    return np.log(count_V / max(1, count_V.sum()) + SMOOTHING)


def _read_back(waiting: IO[bytes], sizes: list[int]) -> Iterator[np.ndarray]:
    return (np.frombuffer(waiting.read(2 * size), dtype=np.uint16) for size in sizes)


def _bucket(gram: str) -> int:
    return int.from_bytes(hashlib.sha256(gram.encode()).digest(), "big") % BUCKETS
