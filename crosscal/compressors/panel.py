"""The columns of one panel, fixed one after another: the innermost loop of SparseGPT and GPTQ.

    q = rule(w_j),  e_j = (w_j - q) R_jj,  W[:, k] -= e_j U[j, k] for k > j           U = R⁻¹ of the panel

One column is a handful of vector operations over all rows. In float32 the panel is one kernel on a CPU, which walks the
columns inside, compiled by Numba (`numba_panel`). On a GPU it is plain torch, or with `CROSSCAL_TRITON=1` a kernel of
Triton (`triton_panel`) that no GPU has run yet. All take the same decisions by the same arithmetic.

Shapes: C columns of the panel, R stacked rows, M columns of an n:m group, P pairs of them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.compressors.column_rule import LEAST_PANEL_COLUMNS
from crosscal.compressors.grid import from_ints, to_ints
from crosscal.compressors.selection import lowest_of_group
from crosscal.errors import UsageError

TRITON_SWITCH = "CROSSCAL_TRITON"
"""An environment variable: 1 uses Triton's kernel on a GPU. Off until one has run it."""


@dataclass(frozen=True)
class Pattern:
    """Rows that keep n of every m columns; the mask is drawn when the loop reaches a group, from the weights then."""

    rows: slice
    kept: int
    group: int


@dataclass(frozen=True, eq=False)
class Rounding:
    """The grids of the panel's columns."""

    scale_CR: Tensor
    bits_R: Tensor
    stored_dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class Panel:
    """What is to be fixed, and how."""

    weight_CR: Tensor
    """As they stand: every column before the panel has had its say."""
    upper_CC: Tensor
    """U = R⁻¹ of the panel's columns."""
    root_C: Tensor
    """R_jj."""
    score_C: Tensor
    """What a weight's score is per unit: R_jj, or 0 for a dead input, whose weights cost nothing."""
    drop_CR: Tensor | None = None
    """1 where a weight is to be pruned, as far as that is known beforehand, else 0; None when nothing is pruned. In
    the weights' dtype: a CPU multiplies by a mask many times as fast as it branches on one."""
    patterns: Sequence[Pattern] = ()
    rounding: Rounding | None = None


@dataclass(frozen=True, eq=False)
class FixedPanel:
    weight_CR: Tensor
    """Final: pruned weights are exactly 0, rounded ones exactly on their grid."""
    error_CR: Tensor
    """e_j, what the columns after the panel make up for."""
    ints_CR: Tensor | None
    """The grid's integers, int8."""


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
        from crosscal.compressors.numba_panel import fix_panel_numba

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


def bands(panel: Panel) -> Iterator[tuple[int, int, int, int]]:
    """(first row, last, kept, group) of neighbouring rows with one pattern; group 0 is none."""
    row = 0
    for pattern in panel.patterns:
        if row < pattern.rows.start:
            yield row, pattern.rows.start, 0, 0
        yield pattern.rows.start, pattern.rows.stop, pattern.kept, pattern.group
        row = pattern.rows.stop
    if row < panel.weight_CR.shape[1]:
        yield row, panel.weight_CR.shape[1], 0, 0


def fix_panel_torch(panel: Panel) -> FixedPanel:
    """One column at a time, in plain torch."""
    weight_CR = panel.weight_CR.clone()
    drop_CR = panel.drop_CR.clone() if panel.patterns and panel.drop_CR is not None else panel.drop_CR
    error_CR = torch.zeros_like(weight_CR)
    ints_CR = None if panel.rounding is None else torch.empty_like(weight_CR)
    for j, (column_R, error_R) in enumerate(zip(weight_CR.unbind(), error_CR.unbind(), strict=True)):
        if drop_CR is not None:
            _draw(panel, j, weight_CR, drop_CR)
        if panel.rounding is not None and ints_CR is not None:
            fixed_R = _round(panel.rounding, j, _kept(column_R, None if drop_CR is None else drop_CR[j]), ints_CR[j])
            torch.sub(column_R, fixed_R, out=error_R).mul_(panel.root_C[j])
            column_R.copy_(fixed_R)
        elif drop_CR is not None:
            torch.mul(column_R, drop_CR[j], out=error_R).mul_(panel.root_C[j])
        weight_CR[j + 1 :].addr_(panel.upper_CC[j, j + 1 :], error_R, alpha=-1)
    if panel.rounding is None:
        weight_CR = _kept(weight_CR, drop_CR)  # a column is not touched any more once it is fixed
    return FixedPanel(weight_CR, error_CR, None if ints_CR is None else ints_CR.to(torch.int8))


def _kept(weight: Tensor, drop: Tensor | None) -> Tensor:
    """Dropped weights are 0, not reached by subtraction and not the -0 that a product may give."""
    return weight if drop is None else (1 - drop).mul_(weight).add_(0.0)


def _round(rounding: Rounding, j: int, wanted_R: Tensor, ints_R: Tensor) -> Tensor:
    scale_R = rounding.scale_CR[j]
    ints_R.copy_(to_ints(wanted_R, scale_R, rounding.bits_R))
    return from_ints(ints_R, scale_R, rounding.stored_dtype)


def _draw(panel: Panel, j: int, weight_CR: Tensor, drop_CR: Tensor) -> None:
    for pattern in panel.patterns:
        if j % pattern.group == 0:
            columns = slice(j, j + pattern.group)
            score_MR = (weight_CR[columns, pattern.rows] * panel.score_C[columns, None]).square_()
            drop_CR[columns, pattern.rows] = lowest_of_group(score_MR, pattern.group - pattern.kept).to(drop_CR.dtype)
