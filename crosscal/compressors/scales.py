"""Scales: compute the optimal group scales while the integers stay fixed.

A row is linear in its scales, v = Σ_g s_g z_g, with z_g the integers of group g. The minimum of (w - v) H (w - v)ᵀ
therefore solves G equations per row:

    A s = b,   A_gh = z_g H_gh z_hᵀ,   b_g = z_g (H w)_g

Shapes: O outputs, I inputs, G groups, C inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.problem import row_losses_O
from crosscal.compressors.recipe import alone
from crosscal.compressors.state import Grid, Layer, Site, Statistic

RIDGE = 1e-6
"""Relative ridge on the diagonal, for groups whose integers are (nearly) the same combination of inputs."""


@dataclass(frozen=True)
class Scales:
    kind: ClassVar = "refine"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 1
    compress = alone

    def __call__(self, site: Site) -> Site:
        """Nonpositive scales are rejected; a row whose new scales, rounded as stored, give no gain is unchanged."""
        return site.each(lambda layer: _refitted(layer, site.statistics.hessian_II))


def _refitted(layer: Layer, hessian_II: Tensor) -> Layer:
    if not isinstance(layer.base, Grid):
        return layer
    grid, target_OI = layer.base, layer.base_target_OI
    scale_OG = least_squares_OG(target_OI, grid.ints_OI.to(target_OI), grid.scale_OG, hessian_II)
    if grid.stored_dtype is not None:
        scale_OG = scale_OG.to(grid.stored_dtype).to(scale_OG.dtype)
    candidate = replace(grid, scale_OG=torch.where(scale_OG > 0, scale_OG, grid.scale_OG))
    before_O, after_O = (row_losses_O(target_OI - form.weight_OI, hessian_II) for form in (grid, candidate))
    better_O1 = (after_O < before_O)[:, None]
    return layer.changed(replace(grid, scale_OG=torch.where(better_O1, candidate.scale_OG, grid.scale_OG)))


def least_squares_OG(target_OI: Tensor, ints_OI: Tensor, scale_OG: Tensor, hessian_II: Tensor) -> Tensor:
    """Return the solution s of every row; a group without a nonzero integer on a live input keeps its scale."""
    outputs, groups = scale_OG.shape
    ints_OGC = ints_OI.view(outputs, groups, -1)
    columns = ints_OGC.shape[2]
    system_OGG = torch.stack(
        [
            torch.einsum("ogc,ogc->og", (ints_OGC[:, h] @ hessian_II[own]).view_as(ints_OGC), ints_OGC)
            for h in range(groups)
            for own in [slice(h * columns, (h + 1) * columns)]
        ],
        dim=2,
    )
    wanted_OG = torch.einsum("ogc,ogc->og", (target_OI @ hessian_II).view_as(ints_OGC), ints_OGC)
    diagonal_OG = system_OGG.diagonal(dim1=1, dim2=2)
    empty_OG = diagonal_OG <= 0
    diagonal_OG.mul_(1 + RIDGE).masked_fill_(empty_OG, 1.0)
    return torch.linalg.solve(system_OGG, torch.where(empty_OG, scale_OG, wanted_OG))
