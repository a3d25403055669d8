"""SciPy's BLAS routines `syrk` and `gemm`, called without Python's global interpreter lock (GIL).

torch offers no `syrk`, and its `gemm` is MKL's, which takes a fifth to two fifths longer on processors not from Intel.
SciPy's own functions hold the GIL while they compute, so other threads would wait.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController

BLAS_LETTERS = {torch.float32: "s", torch.float64: "d"}
Routine = Callable[..., None]

_LETTER, _INT, _ADDRESS = ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_void_p


class Blas:
    """SciPy's BLAS. Its thread count applies to the process: one while any caller is in `one_thread`, then restored."""

    def __init__(self) -> None:
        self._lock, self._alone = threading.Lock(), 0
        self._routines: dict[torch.dtype, tuple[Routine, Routine]] = {}

    def routines(self, dtype: torch.dtype) -> tuple[Routine, Routine]:
        """Return (syrk, gemm) of a dtype. The first call takes half a second."""
        with self._lock:
            if not self._routines:
                self._routines = {dtype: (_syrk(dtype), _gemm(dtype)) for dtype in BLAS_LETTERS}
            return self._routines[dtype]

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Limit BLAS to one thread per call until all concurrent callers have left this context."""
        self.routines(torch.float32)  # load BLAS first: the limit applies only to loaded libraries
        with self._lock:
            if not self._alone:
                self._limit = ThreadpoolController().select(user_api="blas").limit(limits=1)
            self._alone += 1
        try:
            yield
        finally:
            with self._lock:
                self._alone -= 1
                if not self._alone:
                    self._limit.restore_original_limits()


BLAS = Blas()
"""One per process: the thread count may be restored only when no other caller needs the limit."""


def _syrk(dtype: torch.dtype) -> Routine:
    """uplo, trans, n, k, alpha, a, lda, beta, c, ldc."""
    return _routine(dtype, "syrk", "LLIINAINAI")


def _gemm(dtype: torch.dtype) -> Routine:
    """transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc."""
    return _routine(dtype, "gemm", "LLIIINAIAINAI")


def _routine(dtype: torch.dtype, name: str, kinds: str) -> Routine:
    """`kinds` has a letter for each argument: L a letter, I an integer, N a number, A an address. All are passed by
    reference."""
    from numba.extending import get_cython_function_address

    number = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    passed = {"L": _LETTER, "I": _INT, "N": ctypes.POINTER(number), "A": _ADDRESS}
    made = {"I": ctypes.c_int, "N": number}
    address = get_cython_function_address("scipy.linalg.cython_blas", BLAS_LETTERS[dtype] + name)
    call = ctypes.CFUNCTYPE(None, *(passed[kind] for kind in kinds))(address)

    def routine(*arguments: object) -> None:
        call(*(made[k](a) if k in made else a for k, a in zip(kinds, arguments, strict=True)))  # type: ignore[operator]

    return routine
