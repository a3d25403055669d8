"""The upper triangle of a symmetric matrix as byte planes that compress well, and back, bit for bit.

The exponent is the compressible part of a floating-point number. In a Gram matrix the diagonal predicts it, since
|H_ij| ≤ √(H_ii H_jj): once half the sum of the two diagonal exponents is subtracted, it is small and similar for all
entries. The stored word of an entry is

    rotate(bits, 1) - ⌊(e_i + e_j) / 2⌋ · 2^shift        modulo 2^32 or 2^64

The rotation moves the sign behind the fraction, so that the exponent fills the leading bits. Bytes of equal
significance then form one plane each. The loops are compiled by Numba, because they access neither whole rows nor whole
columns; they release the GIL.

Shapes: I inputs, N = I (I + 1) / 2 entries of the triangle, row by row, P bytes per number.
"""

from __future__ import annotations

import numpy as np

from crosscal.compiled import compiled

PANEL_ROWS = 16  # side of the tiles that `_mirror` copies: a tile and its transpose fit into the cache
ONE = np.uint64(1)
WORDS = {4: np.uint32, 8: np.uint64}
SHIFTS = {4: 24, 8: 53}
"""Lowest bit of the exponent in a rotated word: the exponent has 8 bits in float32, 11 in float64."""


def pack_triangle(gram_II: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (planes_PN, exponent_I): byte planes, least significant first, and the diagonal's biased exponents."""
    inputs, size = len(gram_II), gram_II.itemsize
    words_II, shift = gram_II.view(WORDS[size]), SHIFTS[size]
    exponent_I = ((words_II.diagonal() << 1) >> shift).astype(np.uint16)
    planes_PN = np.empty((size, inputs * (inputs + 1) // 2), np.uint8)
    _pack(words_II, exponent_I.astype(np.uint64), np.uint64(8 * size - 1), np.uint64(shift), planes_PN)
    return planes_PN, exponent_I


def unpack_triangle(planes_PN: np.ndarray, exponent_I: np.ndarray | None, inputs: int) -> np.ndarray:
    """Return the full matrix, in the floating-point type with as many bytes as there are planes.

    Without exponents the planes contain the numbers' own bytes, as the first version of the store wrote them.
    """
    size = len(planes_PN)
    words_II = np.empty((inputs, inputs), WORDS[size])
    if exponent_I is None:
        _unpack_plain(planes_PN, words_II)
    else:
        _unpack(planes_PN, exponent_I.astype(np.uint64), np.uint64(8 * size - 1), np.uint64(SHIFTS[size]), words_II)
    _mirror(words_II)
    return words_II.view(f"f{size}")


@compiled
def _pack(words_II, exponent_I, last, shift, planes_PN):
    """`last`: index of a word's highest bit."""
    position = 0
    for i in range(len(words_II)):
        later = len(words_II) - i
        for plane in range(len(planes_PN)):
            down = np.uint64(8 * plane)
            for k in range(later):
                word = np.uint64(words_II[i, i + k])
                rotated = (word << ONE) | (word >> last)
                predicted = (exponent_I[i] + exponent_I[i + k]) >> ONE
                planes_PN[plane, position + k] = np.uint8((rotated - (predicted << shift)) >> down)
        position += later


@compiled
def _unpack(planes_PN, exponent_I, last, shift, words_II):
    word_I = np.empty(len(words_II), np.uint64)
    sign_mask, position = ONE << last, 0
    for i in range(len(words_II)):
        later = len(words_II) - i
        for k in range(later):
            word_I[k] = ((exponent_I[i] + exponent_I[i + k]) >> ONE) << shift
        for plane in range(len(planes_PN)):
            up = np.uint64(8 * plane)
            for k in range(later):
                word_I[k] += np.uint64(planes_PN[plane, position + k]) << up
        for k in range(later):
            without_sign = (word_I[k] >> ONE) & (sign_mask - ONE)
            words_II[i, i + k] = without_sign | ((word_I[k] & ONE) << last)
        position += later


@compiled
def _unpack_plain(planes_PN, words_II):
    position = 0
    for i in range(len(words_II)):
        later = len(words_II) - i
        words_II[i, i:] = 0
        for plane in range(len(planes_PN)):
            up = np.uint64(8 * plane)
            for k in range(later):
                words_II[i, i + k] |= np.uint64(planes_PN[plane, position + k]) << up
        position += later


@compiled
def _mirror(words_II):
    inputs = len(words_II)
    for top in range(0, inputs, PANEL_ROWS):
        for left in range(top, inputs, PANEL_ROWS):
            for row in range(left, min(left + PANEL_ROWS, inputs)):
                for column in range(top, min(top + PANEL_ROWS, row)):
                    words_II[row, column] = words_II[column, row]
