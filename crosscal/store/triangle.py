"""The upper triangle of a symmetric matrix as byte planes that compress well, and back, bit for bit.

Of a floating-point number the exponent compresses, and of a Gram matrix's entry it is foretold by the diagonal, since
|H_ij| ≤ √(H_ii H_jj): half the sum of the two diagonal exponents is taken away, and what is left is small and much the
same for all. So an entry's word is

    rotate(bits, 1) - ⌊(e_i + e_j) / 2⌋ · 2^shift        modulo 2^32 or 2^64

with the sign moved behind the fraction, so that the exponent fills the leading bits. Bytes of equal significance then
stand together, in one plane each. Loops compiled by Numba, because what is wanted is neither rows nor columns; other
threads of Python run meanwhile.

Shapes: I inputs, N = I (I + 1) / 2 entries of the triangle, row by row, P bytes a number.
"""

from __future__ import annotations

import numpy as np

from crosscal.compiled import compiled

PANEL_ROWS = 16  # mirrored at once: a block and its transpose fit the cache
ONE = np.uint64(1)
WORDS = {4: np.uint32, 8: np.uint64}
SHIFTS = {4: 24, 8: 53}
"""Where the exponent begins in a rotated word: float32 has 8 bits of it, float64 has 11."""


def pack_triangle(gram_II: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(planes_PN, exponent_I): the least significant plane first, and what the planes take for granted."""
    inputs, size = len(gram_II), gram_II.itemsize
    words_II, shift = gram_II.view(WORDS[size]), SHIFTS[size]
    exponent_I = ((words_II.diagonal() << 1) >> shift).astype(np.uint16)
    planes_PN = np.empty((size, inputs * (inputs + 1) // 2), np.uint8)
    _pack(words_II, exponent_I.astype(np.uint64), np.uint64(8 * size - 1), np.uint64(shift), planes_PN)
    return planes_PN, exponent_I


def unpack_triangle(planes_PN: np.ndarray, exponent_I: np.ndarray | None, inputs: int) -> np.ndarray:
    """The full matrix, in the floating-point type of as many bytes as there are planes.

    Without exponents the planes are those of the numbers as they are: so the first version of the store wrote them.
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
    """`last`: the number of a word's last bit."""
    position = 0
    for i in range(len(words_II)):
        later = len(words_II) - i
        for plane in range(len(planes_PN)):
            down = np.uint64(8 * plane)
            for k in range(later):
                word = np.uint64(words_II[i, i + k])
                rotated = (word << ONE) | (word >> last)
                foretold = (exponent_I[i] + exponent_I[i + k]) >> ONE
                planes_PN[plane, position + k] = np.uint8((rotated - (foretold << shift)) >> down)
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
