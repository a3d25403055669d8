"""Which kernel fixes a panel: in float32 Numba's on a CPU, which walks the columns inside; on a GPU plain torch, or
with `CROSSCAL_TRITON=1` Triton's, which no GPU has run yet.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from crosscal.compressors.column_rule import LEAST_PANEL_COLUMNS
from crosscal.compressors.numba_panel import fix_panel_numba
from crosscal.compressors.panel import FixedPanel, Panel, fix_panel_torch
from crosscal.errors import UsageError

TRITON_SWITCH = "CROSSCAL_TRITON"
"""An environment variable: 1 uses Triton's kernel on a GPU. Off until one has run it."""


def fix_panel(panel: Panel) -> FixedPanel:
    """Fix every column of a panel, by the fastest way its device and dtype have."""
    return _fastest(panel.weight_CR.device.type, panel.weight_CR.dtype)(panel)


def panel_columns(device: str, dtype: torch.dtype) -> int:
    """How many columns a panel has at most: their updates go one by one, those of later columns as one product.

    The kernels' cost is arithmetic, and on a CPU's caches a panel of four times the columns saves three products; on
    a GPU's registers it would not fit.
    """
    return 128 if _fastest(device, dtype) is not fix_panel_torch and device == "cpu" else LEAST_PANEL_COLUMNS


def _fastest(device: str, dtype: torch.dtype) -> Callable[[Panel], FixedPanel]:
    return _kernel(device, dtype, device == "cuda" and wants_triton())


@functools.cache
def _kernel(device: str, dtype: torch.dtype, triton: bool) -> Callable[[Panel], FixedPanel]:
    if dtype != torch.float32:
        return fix_panel_torch
    if triton:
        from crosscal.compressors.triton_panel import fix_panel_triton

        return fix_panel_triton
    if device == "cpu":
        return fix_panel_numba
    return fix_panel_torch


def wants_triton() -> bool:
    """Whether a GPU's panels are to be fixed by Triton's kernel. Raises `UsageError` where there is no Triton."""
    asked = os.environ.get(TRITON_SWITCH, "")
    if asked in ("", "0"):
        return False
    if asked != "1" or not importlib.util.find_spec("triton"):
        what = "Triton is not installed" if asked == "1" else "not a switch"
        raise UsageError(what, where=TRITON_SWITCH, got=asked, do="Unset it, or set it to 1 with `triton` installed.")
    return True
