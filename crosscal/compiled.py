"""Loops compiled by Numba; other threads of Python run while one of them runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code, made on its first call with arguments of a kind.

    The code is kept beside Python's bytecode, or in the user's cache folder, and trusted as much as they are; where
    neither can be written each process compiles anew. Products and sums may be fused; nothing else of floating-point
    arithmetic is relaxed, and a division by zero is what it is in numpy.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place for the code
        return numba.njit(**options)(function)
