"""Rules of the column loop: how a column is fixed (pruned, rounded to a grid, or both), and in which rows of the stack.

Shapes: I inputs, N blocks, B columns of a block, R stacked rows, O outputs of one layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from crosscal.compiled import run_loops
from crosscal.compressors import grid
from crosscal.compressors.panel import NMPattern
from crosscal.compressors.selection import lowest, mark_lowest
from crosscal.compressors.sparsity import Sparsity
from crosscal.compressors.state import Layer
from crosscal.errors import UsageError
from crosscal.statistics.factor import check_damping

LEAST_PANEL_COLUMNS = 32
"""Maximum columns of a panel, on some kernels a multiple. m of n:m divides it, so that a group lies in one panel."""


@dataclass(frozen=True)
class ColumnRule:
    """The settings of one method, as the column loop needs them."""

    sparsity: Sparsity | None = None
    bits: int | None = None
    group_size: int | None = None
    """Inputs per scale; None means one scale per row."""
    activation_order: bool = False
    """Process inputs from the largest H_jj to the smallest (`desc_act`); all grids are then fitted beforehand."""
    scale_search: bool = False
    """Choose each group's scale by the least error weighted with diag H, instead of by its largest weight."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    block_columns: int = 128
    """Columns that share a pruning threshold; a multiple of 32."""

    @property
    def stack_key(self) -> tuple[object, ...]:
        """Rules with equal keys can run in one loop."""
        how = (self.bits is None, self.group_size, self.activation_order, self.scale_search)
        return (*how, self.damping, self.block_columns)

    def check_settings(self) -> None:
        """Check all that does not depend on a layer. Raises `UsageError`."""
        check_damping(self.damping)
        if self.bits is not None:
            grid.check_settings(self.bits, self.group_size)
        group = self.sparsity.group if self.sparsity else None
        if group and (self.activation_order or LEAST_PANEL_COLUMNS % group):
            raise UsageError(
                "n:m needs an m that divides 32, and inputs in their own order",
                got=str(self.sparsity),
                do="Use 2:4 or 4:8, or a fraction.",
            )
        if group and self.bits is not None and (self.group_size or group) % group:
            raise UsageError(
                "n:m needs a group_size divisible by m",
                got=f"{self.sparsity} and group_size {self.group_size}",
                do="Use 32, 64 or 128, or null for one scale per row.",
            )

    def check(self, inputs: int, name: str) -> None:
        """Raise `UsageError` if a layer with this number of inputs cannot be solved."""
        if self.sparsity:
            self.sparsity.check(inputs, name)
        if self.bits is not None:
            grid.check_grid(self.group_size, inputs, name)


@dataclass(frozen=True)
class Segment:
    """The rows of the stack that belong to one layer under one rule."""

    layer: Layer
    rule: ColumnRule
    rows: slice


def segments_of(layers: Sequence[Layer], rules: Sequence[ColumnRule]) -> list[Segment]:
    """Assign rows by rule, then by layer. Raises `UsageError` for settings that do not fit a layer."""
    segments, first = [], 0
    for rule, layer in itertools.product(rules, layers):
        outputs, inputs = layer.target_OI.shape
        rule.check(inputs, layer.name)
        segments.append(Segment(layer, rule, slice(first, first + outputs)))
        first += outputs
    return segments


def patterns(segments: Sequence[Segment]) -> list[NMPattern]:
    """Return the row ranges with n:m masks; adjacent segments of one pattern form one range."""
    found: list[NMPattern] = []
    for sparsity, same in itertools.groupby(segments, lambda segment: segment.rule.sparsity):
        if sparsity and sparsity.group:
            rows = [segment.rows for segment in same]
            found.append(NMPattern(slice(rows[0].start, rows[-1].stop), sparsity.kept or 0, sparsity.group))
    return found


def block_counts(segment: Segment, order_I: Tensor) -> list[int]:
    """Return how many weights each block loses beside those that an earlier step removed.

    Every block loses the same share, the earlier losses included, by cumulative rounding. Where a block has lost more
    already, it loses nothing, and the share of the others is smaller.
    """
    sparsity, columns = segment.rule.sparsity, segment.rule.block_columns
    outputs, inputs = segment.layer.target_OI.shape
    gone_I, fraction = torch.zeros(inputs), sparsity.fraction if sparsity else 0.0
    if segment.layer.keep_OI is not None:
        gone_I = (~segment.layer.keep_OI).sum(0)[order_I]
    gone_N = np.array([int(part_B.sum()) for part_B in gone_I.split(columns)])
    size_N = np.array([outputs * len(part_B) for part_B in order_I.split(columns)])
    share, full_N = fraction, np.zeros(len(size_N), bool)
    while (over_N := ~full_N & (gone_N > share * size_N)).any():
        full_N |= over_N
        share = (fraction * size_N.sum() - gone_N[full_N].sum()) / max(size_N[~full_N].sum(), 1)
    lost = gone_N[full_N].sum()
    edge_N = np.rint(lost + share * np.where(full_N, 0, size_N).cumsum())
    return [int(count) for count in np.diff(edge_N, prepend=lost) - np.where(full_N, 0, gone_N)]


def block_drops(segments: Sequence[Segment], counts: Sequence[int], work_BR: Tensor, score_B: Tensor) -> Tensor:
    """Return 1 where a fractional sparsity prunes a block's weights: each layer's `count` lowest w² / U_jj²
    (2301.00774, eq. 5), selected once for the block. NaN is never selected."""
    drop_BR = torch.zeros_like(work_BR)
    draws = []
    for segment, count in zip(segments, counts, strict=True):
        sparsity = segment.rule.sparsity
        if sparsity and not sparsity.group:
            own_BO = work_BR[:, segment.rows]
            if work_BR.is_cpu and work_BR.dtype == torch.float32:
                draws.append(partial(mark_lowest, drop_BR[:, segment.rows], own_BO, score_B, count))
            else:
                drop_BR[:, segment.rows] = lowest((own_BO * score_B[:, None]).square_(), count)
    run_loops(draws, torch.get_num_threads())
    return drop_BR
