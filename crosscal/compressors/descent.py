"""Coordinate descent: set each integer in turn to its best grid level with all others fixed, in several sweeps.

With E = W - V, the optimum of column j is v_j + (E H)_j / H_jj; it is rounded to the grid and E H is updated. No change
raises the loss. This is coordinate descent on the grid as in QuantEase (Behdin et al. 2023, arXiv 2309.01885) and
CDQuant, started from the integers of the step before instead of from rounding.

Shapes: O outputs, I inputs, B inputs of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.grid import from_ints, to_ints
from crosscal.compressors.recipe import alone
from crosscal.compressors.state import Grid, Layer, Site, Statistic
from crosscal.errors import UsageError

BLOCK_COLUMNS = 64  # updated one by one; their changes reach all other columns as one product


@dataclass(frozen=True)
class Descent:
    sweeps: int = 2
    """Number of passes over all columns."""

    kind: ClassVar = "refine"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        if self.sweeps < 0:
            raise UsageError("sweeps are 0 or more", got=str(self.sweeps))

    def __call__(self, site: Site) -> Site:
        return site.each(lambda layer: self._descend(layer, site.statistics.hessian_II))

    def _descend(self, layer: Layer, hessian_II: Tensor) -> Layer:
        if not isinstance(layer.base, Grid):
            return layer
        grid = layer.base
        columns = hessian_II.shape[0] // grid.scale_OG.shape[1]
        scale_IO = grid.scale_OG.mT.repeat_interleave(columns, 0)
        weight_IO = grid.weight_OI.mT.clone(memory_format=torch.contiguous_format)
        ints_IO = grid.ints_OI.mT.to(scale_IO)
        pull_IO = hessian_II @ (layer.base_target_OI.mT - weight_IO)
        keep_IO = None if layer.keep_OI is None else layer.keep_OI.mT.to(scale_IO)
        for _ in range(self.sweeps):
            for start in range(0, len(hessian_II), BLOCK_COLUMNS):
                own = slice(start, start + BLOCK_COLUMNS)
                change_BO = _sweep_block(
                    ints_IO[own], weight_IO[own], scale_IO[own], pull_IO[own].clone(), hessian_II[own, own],
                    None if keep_IO is None else keep_IO[own], grid,
                )  # fmt: skip
                pull_IO.addmm_(hessian_II[:, own], change_BO, alpha=-1)
        return layer.changed(replace(grid, ints_OI=ints_IO.mT.to(torch.int8).contiguous()))


def _sweep_block(
    ints_BO: Tensor,
    weight_BO: Tensor,
    scale_BO: Tensor,
    pull_BO: Tensor,
    hessian_BB: Tensor,
    keep_BO: Tensor | None,
    grid: Grid,
) -> Tensor:
    """Update the columns of a block, `ints_BO` and `weight_BO` (views of the sweep's own copies) in place; return the
    change of each weight."""
    square_B = hessian_BB.diagonal()
    bits = torch.tensor(float(grid.bits), dtype=scale_BO.dtype, device=scale_BO.device)
    change_BO = torch.zeros_like(weight_BO)
    for j in range(len(weight_BO)):
        alive = (square_B[j] > 0).to(scale_BO)
        wanted_O = weight_BO[j] + alive * pull_BO[j] / square_B[j].clamp_min(torch.finfo(scale_BO.dtype).tiny)
        wanted_O = wanted_O if keep_BO is None else wanted_O * keep_BO[j]
        level_O = to_ints(wanted_O, scale_BO[j], bits)
        fixed_O = from_ints(level_O, scale_BO[j], grid.stored_dtype)
        change_BO[j] = fixed_O - weight_BO[j]
        ints_BO[j], weight_BO[j] = level_O, fixed_O
        pull_BO.addr_(hessian_BB[:, j], change_BO[j], alpha=-1)
    return change_BO
