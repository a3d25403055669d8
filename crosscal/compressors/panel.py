"""Fix the columns of one panel one after another: the innermost loop of SparseGPT and GPTQ.

    q = rule(w_j),  e_j = (w_j - q) R_jj,  W[:, k] -= e_j U[j, k] for k > j           U = R⁻¹ of the panel

One column takes a few vector operations over all rows: plain torch here, compiled in `numba_panel` and `triton_panel`;
`kernels` selects one of them. All make the same decisions by the same arithmetic.

Shapes: C columns of the panel, R stacked rows, M columns of an n:m group, P pairs of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.compressors.grid import from_ints, to_ints
from crosscal.compressors.selection import lowest_of_group


@dataclass(frozen=True)
class NMPattern:
    """Rows that keep n of every m columns; a group's mask is selected from its weights when the loop reaches it."""

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
    """Input of a panel kernel: the columns to fix, and how."""

    weight_CR: Tensor
    """Current weights: the errors of all columns before the panel have been propagated."""
    upper_CC: Tensor
    """U = R⁻¹ of the panel's columns."""
    root_C: Tensor
    """R_jj."""
    pivot_C: Tensor
    """Factor f of the pruning score (f w)²: R_jj, or 0 for a dead input, whose weights cost nothing."""
    drop_CR: Tensor | None = None
    """1 where a weight is pruned, as far as known before the panel (n:m is not), else 0; None if nothing is pruned. In
    the weights' dtype: on a CPU, multiplying by a mask is many times as fast as branching on one."""
    patterns: Sequence[NMPattern] = ()
    rounding: Rounding | None = None


@dataclass(frozen=True, eq=False)
class FixedPanel:
    """Output of a panel kernel."""

    weight_CR: Tensor
    """Final: pruned weights are exactly 0, rounded ones exactly on their grid."""
    error_CR: Tensor
    """e_j, which the columns after the panel compensate."""
    ints_CR: Tensor | None
    """The grid's integers, int8."""
    drop_CR: Tensor | None
    """1 where a weight was pruned, n:m included; None if nothing is pruned."""


def drops_to_complete(panel: Panel) -> Tensor | None:
    """Return the panel's mask, copied if a kernel is to enter n:m masks."""
    return panel.drop_CR.clone() if panel.patterns and panel.drop_CR is not None else panel.drop_CR


def row_ranges(panel: Panel) -> Iterator[tuple[int, int, int, int]]:
    """Yield ranges of adjacent rows with one pattern: (first row, end, kept, group); group 0 means no pattern."""
    row = 0
    for pattern in panel.patterns:
        if row < pattern.rows.start:
            yield row, pattern.rows.start, 0, 0
        yield pattern.rows.start, pattern.rows.stop, pattern.kept, pattern.group
        row = pattern.rows.stop
    if row < panel.weight_CR.shape[1]:
        yield row, panel.weight_CR.shape[1], 0, 0


def fix_panel_torch(panel: Panel) -> FixedPanel:
    """Fix a panel one column at a time, in plain torch."""
    weight_CR = panel.weight_CR.clone()
    drop_CR = drops_to_complete(panel)
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
        weight_CR = _kept(weight_CR, drop_CR)  # once at the end: a fixed column never changes again
    return FixedPanel(weight_CR, error_CR, None if ints_CR is None else ints_CR.to(torch.int8), drop_CR)


def _kept(weight: Tensor, drop: Tensor | None) -> Tensor:
    """Set dropped weights to exactly 0: not by subtraction, and not the -0 that a product may give."""
    return weight if drop is None else (1 - drop).mul_(weight).add_(0.0)


def _round(rounding: Rounding, j: int, wanted_R: Tensor, ints_R: Tensor) -> Tensor:
    scale_R = rounding.scale_CR[j]
    ints_R.copy_(to_ints(wanted_R, scale_R, rounding.bits_R))
    return from_ints(ints_R, scale_R, rounding.stored_dtype)


def _draw(panel: Panel, j: int, weight_CR: Tensor, drop_CR: Tensor) -> None:
    """Select the masks of the groups that start at column j. What an earlier step removed scores -1: it goes first."""
    for pattern in panel.patterns:
        if j % pattern.group == 0:
            columns = slice(j, j + pattern.group)
            gone_MR = drop_CR[columns, pattern.rows] > 0
            score_MR = (weight_CR[columns, pattern.rows] * panel.pivot_C[columns, None]).square_()
            chosen_MR = lowest_of_group(score_MR.masked_fill_(gone_MR, -1.0), pattern.group - pattern.kept)
            drop_CR[columns, pattern.rows] = (chosen_MR | gone_MR).to(drop_CR.dtype)
