"""Statistics of a calibration text that need no model, and limits beyond which it is unfit for calibration.

The measures of arXiv:2410.17170 except perplexity. Self-generated text shows lower diversity and a higher Zipf
coefficient than web text; random tokens show the opposite.

The limits separate values measured on usable and on unusable text (`benchmarks/sufficiency.py` has the numbers).
Usable: three corpora of real text, the demo's synthetic ones and self-generated text. Unusable: copies, a filled-in
form, near-empty documents and random tokens. Sets had 8 to 128 windows of 256 to 2048 tokens, vocabularies of 8 and 49
thousand.
"""

from __future__ import annotations

# Shapes: S windows, L tokens in a window, V types seen.
from dataclasses import dataclass

import numpy as np
import torch

LONGEST_NGRAM = 4
LEAST_TOKENS = 512
"""Smaller sets have no faults: two windows of one document repeat nothing."""
LEAST_DISTINCT = 0.45
"""Share of distinct 4-grams: text has .55 to .99, five documents repeated over and over .07 to .40."""
LEAST_DOCUMENT_TOKENS = 10.0
"""Mean tokens per document; text has 34 in a sentence."""
MOST_OF_ONE_TOKEN = 0.4
"""Share of the most frequent token; text has .03 to .10."""
LEAST_OF_ONE_TOKEN = 0.01
"""Share of the most frequent token; text has .03 to .10, random tokens at most .004."""
LEAST_UNIQUE, FEW_DOCUMENTS = 0.5, 10
"""Share of unique documents, checked from `FEW_DOCUMENTS` documents on; text has .97 to 1."""


@dataclass(frozen=True)
class TextQuality:
    """Statistics of a calibration set's token windows."""

    tokens: int
    windows: int
    documents: int
    """Passages between end-of-text tokens; the first and the last may be incomplete."""

    unique_documents: int
    repeated_tokens: float
    """1/(S L) Σ 1[w_i among w_<i of the same window]."""

    vocabulary_coverage: float
    """Distinct tokens seen (types) / vocabulary size."""

    ngram_diversity: float
    """Mean over n = 1..4 of unique / total n-grams in the whole set; none spans two windows."""

    distinct_4grams: float
    """Unique / total 4-grams."""

    largest_token_share: float
    """Share of the most frequent token."""

    zipf_coefficient: float
    """a in frequency ~ rank^-a: minus the least-squares slope of ln(frequency) on ln(rank), every type with equal
    weight, ranks from 1 by falling frequency. NaN when only one type occurs."""


def text_quality(
    tokens_SL: torch.Tensor, vocabulary: int, *, begin: int | None = None, end: int | None = None
) -> TextQuality:
    """Measure windows of token ids from a vocabulary of the given size. `begin`: the token at the start of every
    window, which belongs to no document; `end`: the token that closes documents."""
    tokens = tokens_SL.numpy()
    unique_in_windows = sum(len(np.unique(window)) for window in tokens)
    counts_V = np.unique(tokens, return_counts=True)[1]
    distinct = _distinct_ngrams(tokens)
    documents = _documents(tokens, begin, end)
    return TextQuality(
        tokens=tokens.size,
        windows=len(tokens),
        documents=len(documents),
        unique_documents=len(set(documents)),
        repeated_tokens=1 - unique_in_windows / tokens.size,
        vocabulary_coverage=len(counts_V) / vocabulary,
        ngram_diversity=float(np.mean(distinct)),
        distinct_4grams=distinct[-1],
        largest_token_share=float(counts_V.max() / tokens.size),
        zipf_coefficient=_zipf(counts_V),
    )


def faults(quality: TextQuality) -> list[str]:
    """Return the reasons why a set is unfit for calibration, each with value and limit; empty for ordinary text."""
    if quality.tokens < LEAST_TOKENS:
        return []
    per_document = quality.tokens / max(1, quality.documents)
    unique = quality.unique_documents / max(1, quality.documents)
    found = {
        f"few of its 4-grams are distinct ({quality.distinct_4grams:.0%}; text has {LEAST_DISTINCT:.0%} or more): the "
        "same passages again and again": quality.distinct_4grams < LEAST_DISTINCT,
        f"few of its {quality.documents:,} documents are unique ({unique:.0%}; limit {LEAST_UNIQUE:.0%})": (
            unique < LEAST_UNIQUE and quality.documents >= FEW_DOCUMENTS
        ),
        f"its documents are nearly empty ({per_document:.1f} tokens each; limit {LEAST_DOCUMENT_TOKENS:g})": (
            per_document < LEAST_DOCUMENT_TOKENS
        ),
        f"{quality.largest_token_share:.0%} of it is one and the same token (limit {MOST_OF_ONE_TOKEN:.0%})": (
            quality.largest_token_share > MOST_OF_ONE_TOKEN
        ),
        f"its most frequent token is {quality.largest_token_share:.2%} of it (text has {LEAST_OF_ONE_TOKEN:.0%} or "
        "more): like random tokens": quality.largest_token_share < LEAST_OF_ONE_TOKEN,
    }
    return [why for why, is_so in found.items() if is_so]


def _documents(tokens_SL: np.ndarray, begin: int | None, end: int | None) -> list[bytes]:
    has_begin = begin is not None and bool((tokens_SL[:, 0] == begin).all())
    stream = tokens_SL[:, int(has_begin) :].reshape(-1)
    ends = np.flatnonzero(stream == end) + 1 if end is not None else []
    return [part.tobytes() for part in np.split(stream, ends) if len(part)]


def _distinct_ngrams(tokens_SL: np.ndarray) -> list[float]:
    """Return unique / total n-grams for n = 1 to 4, or to the length of a window if that is shorter."""
    types, inverse = np.unique(tokens_SL, return_inverse=True)
    token_ids = inverse.reshape(tokens_SL.shape).astype(np.int64)
    ngram_ids, ratios = token_ids, [len(types) / tokens_SL.size]
    for n in range(2, min(LONGEST_NGRAM, tokens_SL.shape[1]) + 1):
        # number the n-grams by (number of the (n-1)-gram, last token): exact, and far from overflow
        pairs = ngram_ids[:, :-1] * len(types) + token_ids[:, n - 1 :]
        unique, inverse = np.unique(pairs, return_inverse=True)
        ngram_ids = inverse.reshape(pairs.shape).astype(np.int64)
        ratios.append(len(unique) / pairs.size)
    return ratios


def _zipf(counts_V: np.ndarray) -> float:
    if len(counts_V) < 2:
        return float("nan")
    frequency = np.log(np.sort(counts_V)[::-1])
    rank = np.log(np.arange(1, len(counts_V) + 1))
    centred = rank - rank.mean()
    return float(-(centred @ frequency) / (centred @ centred))
