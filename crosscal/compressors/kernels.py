"""Choice of the kernel that fixes a panel: Numba for float32 on a CPU, plain torch otherwise. With `CROSSCAL_TRITON=1`
float32 panels on a GPU use Triton's kernel, which has not been run on a GPU yet.
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
"""Environment variable: 1 selects Triton's kernel on a GPU. Off by default until it has been run on one."""


def fix_panel(panel: Panel) -> FixedPanel:
    """Fix every column of a panel with the fastest kernel for its device and dtype."""
    return _fastest(panel.weight_CR.device.type, panel.weight_CR.dtype)(panel)


def panel_columns(device: str, dtype: torch.dtype) -> int:
    """Return the maximum columns of a panel; they are updated one by one, all later columns by one product.

    The kernels are bound by arithmetic. On a CPU a panel of four times the columns fits the caches and saves three
    products; on a GPU it would not fit the registers.
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
    """True if Triton's kernel is switched on. Raises `UsageError` if Triton is missing or the switch is not 0 or 1."""
    asked = os.environ.get(TRITON_SWITCH, "")
    if asked in ("", "0"):
        return False
    if asked != "1" or not importlib.util.find_spec("triton"):
        what = "Triton is not installed" if asked == "1" else "must be 0 or 1"
        raise UsageError(what, where=TRITON_SWITCH, got=asked, do="Unset it, or set it to 1 with `triton` installed.")
    return True
