"""The upper triangle of XᵀX: half of the work of a plain matrix product.

Shapes: T tokens, I inputs, B rows of a panel.

BLAS has a routine for it, `syrk`, at the speed of a plain product. torch offers none, so that of SciPy's BLAS is
called, on a CPU and in a thread that computes alone. Where a thread of torch has further threads to help it, SciPy's
own would compete with them for the cores (a reading took 55 s instead of 15 on two): there, and on a GPU, the triangle
is made of row panels, each a plain product on the part that is needed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

PANELS = 8  # 1/8 of the triangle is computed needlessly, in products large enough for full speed
LEAST_PANEL_ROWS = 96
BLAS_NAMES = {torch.float32: "ssyrk", torch.float64: "dsyrk"}


def add_half_product(upper_II: Tensor, rows_TI: Tensor) -> None:
    """Add XᵀX to the upper triangle, in place; what stands below the diagonal means nothing afterwards.

    `rows_TI` has the triangle's dtype, or on a GPU a half precision, whose products are summed in the triangle's.
    """
    if upper_II.device.type == "cpu" and upper_II.dtype in BLAS_NAMES and torch.get_num_threads() == 1:
        add_syrk(upper_II, rows_TI)
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


def add_syrk(upper_II: Tensor, rows_TI: Tensor) -> None:
    """The same by BLAS, for a contiguous float32 or float64 triangle on a CPU."""
    # BLAS is told addresses, and nothing else.
    assert upper_II.is_contiguous()
    assert rows_TI.dtype == upper_II.dtype
    if not rows_TI.numel():
        return
    rows_TI = rows_TI.contiguous()
    tokens, inputs = (ctypes.byref(ctypes.c_int(size)) for size in rows_TI.shape)
    one = ctypes.byref((ctypes.c_float if upper_II.dtype == torch.float32 else ctypes.c_double)(1.0))
    # BLAS counts along columns: our upper triangle is its lower one, and our rows are its columns.
    syrk = _syrk(BLAS_NAMES[upper_II.dtype])
    syrk(b"L", b"N", inputs, tokens, one, rows_TI.data_ptr(), inputs, one, upper_II.data_ptr(), inputs)


@functools.cache
def _syrk(name: str) -> Callable[..., None]:
    """uplo, trans, n, k, alpha, a, lda, beta, c, ldc. Called through ctypes, which lets other threads of Python run
    meanwhile; SciPy's Python function does not."""
    from numba.extending import get_cython_function_address  # half a second, on the first use

    letter, pointer = ctypes.c_char_p, ctypes.c_void_p
    kind = ctypes.CFUNCTYPE(None, letter, letter, *[pointer] * 8)
    return kind(get_cython_function_address("scipy.linalg.cython_blas", name))
