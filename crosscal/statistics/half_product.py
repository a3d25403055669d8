"""The upper triangle of XᵀX: half of the work of a plain matrix product.

Shapes: T tokens, I inputs, B rows of a panel.

On one thread of a CPU BLAS has a routine for it, `syrk`, at 0.85 to 1.05 of a plain product's speed. torch offers
none, so it is called through SciPy. With more threads SciPy's OpenBLAS and torch would each keep their own, and each
would wait for work at full speed on the other's cores: a reading took 55 s instead of 15 on two. There, and on a GPU,
the triangle is made of row panels, each a plain product on the part that is needed.
"""

from __future__ import annotations

import torch
from scipy.linalg import get_blas_funcs
from torch import Tensor

PANELS = 8  # 1/8 of the triangle is computed needlessly, in products large enough for full speed
LEAST_PANEL_ROWS = 96
BLAS_DTYPES = (torch.float32, torch.float64)


def add_half_product(upper_II: Tensor, rows_TI: Tensor) -> None:
    """Add XᵀX to the upper triangle, in place; what stands below the diagonal means nothing afterwards.

    `rows_TI` has the triangle's dtype, or on a GPU a half precision, whose products are summed in the triangle's.
    """
    if upper_II.device.type == "cpu" and upper_II.dtype in BLAS_DTYPES and torch.get_num_threads() == 1:
        if rows_TI.numel():
            _syrk(upper_II, rows_TI)
    else:
        add_panels(upper_II, rows_TI)


def add_panels(upper_II: Tensor, rows_TI: Tensor) -> None:
    """The same as row panels: panel i is `X[:, i:i+B]ᵀ X[:, i:]`."""
    inputs = rows_TI.shape[1]
    rows = max(-(-inputs // (16 * PANELS)) * 16, LEAST_PANEL_ROWS)
    for start in range(0, inputs, rows):
        stop = start + rows
        panel_BI, left_TB, right_TI = upper_II[start:stop, start:], rows_TI[:, start:stop], rows_TI[:, start:]
        if rows_TI.dtype == upper_II.dtype:
            panel_BI.addmm_(left_TB.mT, right_TI)
        else:
            panel_BI += torch.mm(left_TB.mT, right_TI, out_dtype=upper_II.dtype)


def _syrk(upper_II: Tensor, rows_TI: Tensor) -> None:
    # BLAS counts along columns: our upper triangle is its lower one, and our rows are its columns.
    triangle, columns = upper_II.numpy().T, rows_TI.contiguous().numpy().T
    (syrk,) = get_blas_funcs(("syrk",), (columns,))
    summed = syrk(1.0, columns, beta=1.0, c=triangle, lower=1, overwrite_c=1)
    assert summed is triangle, "BLAS sums in place"
