"""The upper triangle of XᵀX, at half the work of a plain matrix product; and the full YᵀX.

Shapes: T tokens, I inputs, B rows of a strip or panel, M columns beside it.

A large triangle is split into strips of rows, so that several threads can add to it at once, each to another strip. On
a CPU a strip is BLAS's `syrk` on the diagonal and `gemm` beside it, independent of torch's number of threads; elsewhere
it consists of row panels, each a plain product on the part that is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from crosscal.statistics.blas import BLAS, BLAS_LETTERS

MOST_STRIPS = 4  # of equal area
INPUTS_A_STRIP = 1024  # four strips of a small triangle take a third longer than one; at 4096 inputs 9 %
PANELS = 8  # 1/8 of the triangle is computed needlessly, in products large enough for full speed
LEAST_PANEL_ROWS = 96


def strips(inputs: int) -> Sequence[slice]:
    """Return the rows of each strip of a triangle on a CPU; they depend only on its size."""
    count = min(max(inputs // INPUTS_A_STRIP, 1), MOST_STRIPS)
    edges = [round(inputs * (1 - math.sqrt(1 - k / count)) / 16) * 16 for k in range(count)]
    return [slice(first, last) for first, last in itertools.pairwise([*edges, inputs])]


def add_half_product(upper_II: Tensor, rows_TI: Tensor, strip: slice) -> None:
    """Add `X[:, strip]ᵀ X[:, strip.start:]` to a strip of the upper triangle, in place. Entries below the diagonal are
    undefined afterwards.

    `rows_TI` has the triangle's dtype, or on a GPU half precision, with products summed in the triangle's dtype.
    """
    if upper_II.device.type == "cpu" and upper_II.dtype in BLAS_LETTERS:
        _add_by_blas(upper_II, rows_TI, strip)
    else:
        add_panels(upper_II, rows_TI, strip)


def add_panels(upper_II: Tensor, rows_TI: Tensor, strip: slice) -> None:
    """Do the same by row panels: panel i is `X[:, i:i+B]ᵀ X[:, i:]`."""
    inputs = rows_TI.shape[1]
    rows = max(-(-inputs // (16 * PANELS)) * 16, LEAST_PANEL_ROWS)
    for start in range(strip.start, strip.stop, rows):
        stop = min(start + rows, strip.stop)
        panel_BI, left_TB, right_TI = upper_II[start:stop, start:], rows_TI[:, start:stop], rows_TI[:, start:]
        if rows_TI.dtype == upper_II.dtype:
            panel_BI.addmm_(left_TB.mT, right_TI)
        else:
            panel_BI += torch.mm(left_TB.mT, right_TI, out_dtype=upper_II.dtype)


def add_product(product_II: Tensor, left_TI: Tensor, right_TI: Tensor, strip: slice) -> None:
    """Add `Y[:, strip]ᵀ X` to the rows of a strip, in place. Dtypes and reproducibility: as in `add_half_product`."""
    own_TB = left_TI[:, strip]
    if product_II.device.type == "cpu" and product_II.dtype in BLAS_LETTERS:
        _add_product_by_blas(product_II[strip], own_TB.contiguous(), right_TI.contiguous())
    elif right_TI.dtype == product_II.dtype:
        product_II[strip].addmm_(own_TB.mT, right_TI)
    else:
        product_II[strip] += torch.mm(own_TB.mT, right_TI, out_dtype=product_II.dtype)


def _add_product_by_blas(product_BI: Tensor, left_TB: Tensor, right_TI: Tensor) -> None:
    assert product_BI.is_contiguous()
    assert left_TB.dtype == right_TI.dtype == product_BI.dtype
    tokens, inputs = right_TI.shape
    rows = left_TB.shape[1]
    if not tokens or not inputs or not rows:
        return
    gemm = BLAS.routines(product_BI.dtype)[1]
    right, left, product = right_TI.data_ptr(), left_TB.data_ptr(), product_BI.data_ptr()
    gemm(b"N", b"T", inputs, rows, tokens, 1.0, right, inputs, left, rows, 1.0, product, inputs)


def _add_by_blas(upper_II: Tensor, rows_TI: Tensor, strip: slice) -> None:
    # BLAS gets only addresses, so layout and dtypes are checked here.
    assert upper_II.is_contiguous()
    assert rows_TI.dtype == upper_II.dtype
    tokens, inputs = rows_TI.shape
    first, last = strip.start, strip.stop
    if not tokens or not inputs:
        return
    rows_TI = rows_TI.contiguous()
    own_TB, corner_BB = rows_TI[:, first:].data_ptr(), upper_II[first:, first:].data_ptr()
    # BLAS is column-major: our upper triangle is its lower one, and our rows are its columns.
    syrk, gemm = BLAS.routines(upper_II.dtype)
    syrk(b"L", b"N", last - first, tokens, 1.0, own_TB, inputs, 1.0, corner_BB, inputs)
    if last < inputs:
        beside_TM, beside_BM = rows_TI[:, last:].data_ptr(), upper_II[first:, last:].data_ptr()
        sizes = (inputs - last, last - first, tokens)
        gemm(b"N", b"T", *sizes, 1.0, beside_TM, inputs, own_TB, inputs, 1.0, beside_BM, inputs)
