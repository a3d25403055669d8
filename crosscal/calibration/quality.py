"""What a calibration text is like, in numbers that need no model.

The measures of arXiv:2410.17170 except perplexity. Self-generated text shows lower diversity and a higher Zipf
coefficient than web text; random tokens the contrary.
"""

from __future__ import annotations

# Shapes: S windows, L tokens in a window, V types seen.
from dataclasses import dataclass

import numpy as np
import torch

LONGEST_NGRAM = 4


@dataclass(frozen=True)
class TextQuality:
    repeated_tokens: float
    """1/(S L) Σ 1[w_i among w_<i of the same window]."""

    vocabulary_coverage: float
    """Types seen / vocabulary size."""

    ngram_diversity: float
    """Mean over n = 1..4 of unique / total n-grams in the whole set; none spans two windows."""

    zipf_coefficient: float
    """a in frequency ~ rank^-a: minus the least-squares slope of ln(frequency) on ln(rank), every type with equal
    weight, ranks from 1 by falling frequency. NaN when only one type occurs."""


def text_quality(tokens_SL: torch.Tensor, vocabulary: int) -> TextQuality:
    """Measure windows of token ids from a vocabulary of the given size."""
    tokens = tokens_SL.numpy()
    unique_in_windows = sum(len(np.unique(window)) for window in tokens)
    counts_V = np.unique(tokens, return_counts=True)[1]
    return TextQuality(
        repeated_tokens=1 - unique_in_windows / tokens.size,
        vocabulary_coverage=len(counts_V) / vocabulary,
        ngram_diversity=_ngram_diversity(tokens),
        zipf_coefficient=_zipf(counts_V),
    )


def _ngram_diversity(tokens_SL: np.ndarray) -> float:
    types, inverse = np.unique(tokens_SL, return_inverse=True)
    token_ids = inverse.reshape(tokens_SL.shape).astype(np.int64)
    ngram_ids, ratios = token_ids, [len(types) / tokens_SL.size]
    for n in range(2, min(LONGEST_NGRAM, tokens_SL.shape[1]) + 1):
        # number the n-grams through their (n-1)-gram and last token: exact, and far from overflow
        pairs = ngram_ids[:, :-1] * len(types) + token_ids[:, n - 1 :]
        unique, inverse = np.unique(pairs, return_inverse=True)
        ngram_ids = inverse.reshape(pairs.shape).astype(np.int64)
        ratios.append(len(unique) / pairs.size)
    return float(np.mean(ratios))


def _zipf(counts_V: np.ndarray) -> float:
    if len(counts_V) < 2:
        return float("nan")
    frequency = np.log(np.sort(counts_V)[::-1])
    rank = np.log(np.arange(1, len(counts_V) + 1))
    centred = rank - rank.mean()
    return float(-(centred @ frequency) / (centred @ centred))
