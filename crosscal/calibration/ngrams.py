"""n-grams of words as 64-bit hashes, many texts at once.

Words are runs of letters and digits after NFKC and case folding, so that punctuation, line breaks and capitals make no
difference; a character of a script written without spaces is a word of its own. Everything but the normalisation is
array arithmetic modulo 2^64. Among N different n-grams, two share a hash with a probability of about N² / 2^65.

Shapes: C characters, W words, N n-grams.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NGRAM_WORDS = 13
"""The n of GPT-3's search for evaluation text in training text (arXiv 2005.14165, appendix C), common since."""
WITHOUT_SPACES = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF),
                  (0xF900, 0xFAFF), (0x20000, 0x3FFFF))  # fmt: skip
"""Thai, Lao, Burmese, Khmer, kana, ideographs."""
_BASE, _STEP = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd: they have inverses modulo 2^64
_MODULUS = 1 << 64


@dataclass(frozen=True, eq=False)
class Ngrams:
    """The n-grams of several documents, one document after another."""

    hash_N: np.ndarray
    """uint64."""
    document_N: np.ndarray
    """Index of the document of each n-gram; no n-gram spans two documents."""
    words: np.ndarray
    """Number of words of each document."""


def ngrams_of(texts: Sequence[str], n: int = NGRAM_WORDS) -> Ngrams:
    """Return all n-grams of every text, in order: a text of w words has max(0, w - n + 1)."""
    word_W, document_W = _words([unicodedata.normalize("NFKC", text).casefold() for text in texts])
    counts = np.bincount(document_W, minlength=len(texts))
    if len(word_W) < n:
        nothing = np.zeros(0, np.int64)
        return Ngrams(nothing.astype(np.uint64), nothing, counts)
    last = len(word_W) - n + 1
    hash_N, power = np.zeros(last, np.uint64), 1
    for place in range(n):
        hash_N += word_W[place : place + last] * np.uint64(power)
        power = power * _STEP % _MODULUS
    whole_N = document_W[:last] == document_W[n - 1 :]
    return Ngrams(_mixed(hash_N[whole_N]), document_W[:last][whole_N], counts)


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (hash of each word, index of its text), [W] each."""
    joined = "\n".join(texts)
    plain = joined.isascii()
    code_C = np.frombuffer(joined.encode("ascii" if plain else "utf-32-le"), np.uint8 if plain else np.dtype("<u4"))
    kind_C = _kinds()[code_C]
    letter_C, alone_C = kind_C > 0, kind_C == 2
    starts_C, ends_C = letter_C.copy(), letter_C.copy()
    starts_C[1:] &= ~letter_C[:-1] | alone_C[1:] | alone_C[:-1]
    ends_C[:-1] &= ~letter_C[1:] | alone_C[1:] | alone_C[:-1]
    start_W, end_W = np.flatnonzero(starts_C), np.flatnonzero(ends_C)
    # Hash of the word from s to e: Σ code · base^-(j - s), as a difference of prefix sums times base^s.
    prefix_C = np.cumsum((code_C.astype(np.uint64) + np.uint64(1)) * _powers(pow(_BASE, -1, _MODULUS), len(code_C)))
    before_W = np.where(start_W > 0, prefix_C[start_W - 1], np.uint64(0))
    word_W = (prefix_C[end_W] - before_W) * _powers(_BASE, len(code_C))[start_W]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    first_characters = np.cumsum(lengths + 1) - lengths - 1
    return _mixed(word_W), np.searchsorted(first_characters, start_W, side="right") - 1


def _mixed(number_X: np.ndarray) -> np.ndarray:
    """SplitMix64's last step: a permutation of 64-bit numbers in which every bit depends on every other."""
    number_X = (number_X ^ (number_X >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number_X = (number_X ^ (number_X >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number_X ^ (number_X >> np.uint64(31))


@functools.cache
def _kinds() -> np.ndarray:
    """Code point -> 0 for separators, 1 for letters and digits, 2 for characters that are words of their own."""
    kinds = np.fromiter((chr(code).isalnum() for code in range(0x110000)), np.uint8, 0x110000)
    for first, last in WITHOUT_SPACES:
        kinds[first : last + 1] *= 2
    return kinds


def _powers(base: int, count: int) -> np.ndarray:
    """base^0 … base^(count - 1) modulo 2^64, from cached tables of power-of-two sizes, so that few are built."""
    return _all_powers(base, 1 << max(1, count - 1).bit_length())[:count]


@functools.lru_cache(maxsize=4)
def _all_powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
