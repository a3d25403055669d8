"""Loops compiled by Numba. They release the GIL, so that other Python threads run meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled to machine code, on its first call with each combination of argument types.

    The code is cached beside Python's bytecode or in the user's cache folder, and trusted as much as these are. If
    neither is writable, each process compiles again. Products and sums may be fused (`contract`); no other
    floating-point rule is relaxed, and division by zero behaves as in numpy.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no writable cache folder
        return numba.njit(**options)(function)


def run_loops(loops: Sequence[Callable[[], object]], threads: int) -> None:
    """Run compiled loops that write to disjoint results, at most `threads` at a time."""
    if min(threads, len(loops)) <= 1:
        for loop in loops:
            loop()
        return
    with ThreadPoolExecutor(min(threads, len(loops))) as pool:
        for _ in pool.map(lambda loop: loop(), loops):
            pass
