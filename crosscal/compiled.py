"""Loops compiled by Numba; other threads of Python run while one of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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


def run_loops(loops: Sequence[Callable[[], object]], threads: int) -> None:
    """Run compiled loops that do not touch each other's results, so many at once at most."""
    if min(threads, len(loops)) <= 1:
        for loop in loops:
            loop()
        return
    with ThreadPoolExecutor(min(threads, len(loops))) as pool:
        for _ in pool.map(lambda loop: loop(), loops):
            pass
