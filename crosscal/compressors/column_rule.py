"""What the column loop does to a column: prune it, round it to a grid, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crosscal.compressors import grid
from crosscal.compressors.sparsity import Sparsity
from crosscal.errors import UsageError

LEAST_PANEL_COLUMNS = 32
"""Columns that are fixed together, one by one: panels are so wide or a multiple. Groups of n:m lie inside one."""


@dataclass(frozen=True)
class ColumnRule:
    """The settings of one method, as the column loop needs them."""

    sparsity: Sparsity | None = None
    bits: int | None = None
    group_size: int | None = None
    """Inputs per scale; None is one scale a row."""
    activation_order: bool = False
    """Walk the inputs from the largest H_jj to the smallest; the grids of all groups are then fitted beforehand."""
    scale_search: bool = False
    """Fit each group's scale by the least error weighted with diag H, instead of to its largest weight."""
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
        """What can be said before a layer is seen. Raises `UsageError`."""
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise UsageError("damping must be a number of at least 0", got=str(self.damping))
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
                do="Use 32, 64 or 128, or null for one scale a row.",
            )

    def check(self, inputs: int, name: str) -> None:
        """Whether a layer of so many inputs can be solved. Raises `UsageError`."""
        if self.sparsity:
            self.sparsity.check(inputs, name)
        if self.bits is not None:
            grid.check_grid(self.group_size, inputs, name)
