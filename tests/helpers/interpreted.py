"""The Triton kernel in a separate process: Triton reads `TRITON_INTERPRET` only once, at its first import."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import pytest

from crosscal.compressors.panel import FixedPanel, Panel


@contextmanager
def interpreted_kernel() -> Iterator[Callable[[Panel], FixedPanel]]:
    """Yield `fix_panel_triton`, interpreted on a CPU in a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, mp_context=fresh) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        yield lambda panel: pool.submit(_fix_panel, panel).result()


def _fix_panel(panel: Panel) -> FixedPanel:
    from crosscal.compressors.triton_panel import fix_panel_triton

    return fix_panel_triton(panel)
