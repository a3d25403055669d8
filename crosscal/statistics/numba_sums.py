"""Σ x², Σ |x| and Σ x of a batch in one compiled pass over its rows. Shapes: T tokens, I inputs."""

from __future__ import annotations

import numpy as np

from crosscal.compiled import compiled

ROWS = 64
"""Rows that are summed in the inputs' own precision, four at a time, before they enter the float64 totals."""


@compiled
def add_sums(rows_TI, square_sum_I, abs_sum_I, sum_I):
    """Add the sums of the rows to three float64 vectors, in place."""
    tokens, inputs = rows_TI.shape
    square_part_I, abs_part_I = np.empty(inputs, rows_TI.dtype), np.empty(inputs, rows_TI.dtype)
    part_I = np.empty(inputs, rows_TI.dtype)
    for first in range(0, tokens, ROWS):
        last = min(first + ROWS, tokens)
        square_part_I[:] = 0
        abs_part_I[:] = 0
        part_I[:] = 0
        fours = first + (last - first) // 4 * 4
        for t in range(first, fours, 4):
            _add_four(rows_TI, t, square_part_I, abs_part_I, part_I)
        for t in range(fours, last):
            for i in range(inputs):
                square_part_I[i] += rows_TI[t, i] * rows_TI[t, i]
                abs_part_I[i] += abs(rows_TI[t, i])
                part_I[i] += rows_TI[t, i]
        for i in range(inputs):
            square_sum_I[i] += square_part_I[i]
            abs_sum_I[i] += abs_part_I[i]
            sum_I[i] += part_I[i]


@compiled
def _add_four(rows_TI, t, square_part_I, abs_part_I, part_I):
    for i in range(rows_TI.shape[1]):
        first, second, third, fourth = rows_TI[t, i], rows_TI[t + 1, i], rows_TI[t + 2, i], rows_TI[t + 3, i]
        square_part_I[i] += (first * first + second * second) + (third * third + fourth * fourth)
        abs_part_I[i] += (abs(first) + abs(second)) + (abs(third) + abs(fourth))
        part_I[i] += (first + second) + (third + fourth)
