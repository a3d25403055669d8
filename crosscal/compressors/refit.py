"""Refit: compute the optimal values of the weights that a mask keeps.

    minimise tr((W - B) (H + λI) (W - B)ᵀ)  over B with B = 0 wherever the mask is False

Every row is an independent least-squares problem on its kept columns S, H_SS b_S = (H w)_S. Conjugate gradients run on
all rows at once, one product with H per iteration; ten iterations come within a few per cent of the exact solution,
which is also available (`iterations: null`). The last stage of ALPS (Meng et al. 2024, arXiv 2406.07831), for any mask.

Shapes: O outputs, I inputs, R rows solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.recipe import alone
from crosscal.compressors.sparsity import kept
from crosscal.compressors.state import Dense, Layer, Site, Statistic
from crosscal.errors import NotPositiveDefinite, UsageError
from crosscal.statistics.factor import check_damping

ROWS_BYTES = 2**28
"""Size limit of the matrices that the exact solution factors at once."""


@dataclass(frozen=True)
class Refit:
    iterations: int | None = 10
    """Conjugate-gradient iterations, preconditioned by diag H; null: the exact solution, one Cholesky per row."""
    damping: float = 0.0
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    kind: ClassVar = "refine"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 0:
            raise UsageError("iterations are 0 or more", got=str(self.iterations), do="null is the exact solution.")
        check_damping(self.damping)

    def __call__(self, site: Site) -> Site:
        hessian_II = damped_II(site.statistics.hessian_II, self.damping)
        return site.each(lambda layer: self._refit(layer, hessian_II))

    def _refit(self, layer: Layer, hessian_II: Tensor) -> Layer:
        if layer.keep_OI is None or not isinstance(layer.base, Dense):
            return layer  # nothing was pruned, or the weights are on a grid
        if self.iterations is None:
            weight_OI = exact_OI(layer.base_target_OI, kept(layer), hessian_II, layer.name)
        else:
            weight_OI = conjugate_gradients_OI(
                layer.base_target_OI, layer.base.weight_OI, kept(layer), hessian_II, self.iterations
            )
        return layer.changed(Dense(weight_OI), damping=self.damping or layer.damping)


def damped_II(hessian_II: Tensor, damping: float) -> Tensor:
    """Return H + damping · mean(diag H) · I."""
    if damping == 0:
        return hessian_II
    shifted_II = hessian_II.clone()
    shifted_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    return shifted_II


def conjugate_gradients_OI(
    target_OI: Tensor, start_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, iterations: int
) -> Tensor:
    """Run conjugate gradients on the mask from `start_OI`, preconditioned by diag H; no row's loss increases."""
    mask_OI = keep_OI.to(target_OI)
    square_I = hessian_II.diagonal()
    weight_I = torch.where(square_I > 0, square_I, torch.ones_like(square_I)).reciprocal()
    weight_OI = start_OI * mask_OI
    residual_OI = ((target_OI - weight_OI) @ hessian_II).mul_(mask_OI)
    step_OI = residual_OI * weight_I
    squared_O = (residual_OI * step_OI).sum(1)
    for _ in range(iterations):
        image_OI = (step_OI @ hessian_II).mul_(mask_OI)
        curvature_O = (step_OI * image_OI).sum(1)
        length_O = torch.where(curvature_O > 0, squared_O / curvature_O, torch.zeros_like(squared_O))
        length_O = torch.where(length_O.isfinite(), length_O, torch.zeros_like(length_O))  # a converged row
        weight_OI.addcmul_(step_OI, length_O[:, None])
        residual_OI.addcmul_(image_OI, length_O[:, None], value=-1)
        scaled_OI = residual_OI * weight_I
        before_O, squared_O = squared_O, (residual_OI * scaled_OI).sum(1)
        ratio_O = torch.where(before_O > 0, squared_O / before_O, torch.zeros_like(squared_O))
        step_OI = scaled_OI.addcmul_(step_OI, ratio_O[:, None])
    return weight_OI


def exact_OI(target_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, name: str) -> Tensor:
    """Return b_S = H_SS⁻¹ (H w)_S of every row. Outside S each system is the identity, so rows of different supports
    are factored together. Dead inputs get 0. Raises `NotPositiveDefinite`."""
    inputs = len(hessian_II)
    at_once = max(1, ROWS_BYTES // (inputs * inputs * hessian_II.element_size()))
    image_OI = target_OI @ hessian_II
    alive_I = hessian_II.diagonal() > 0
    solved_OI = torch.zeros_like(target_OI)
    for start in range(0, len(target_OI), at_once):
        rows = slice(start, start + at_once)
        mask_RI = (keep_OI[rows] & alive_I).to(hessian_II)
        system_RII = mask_RI[:, :, None] * hessian_II * mask_RI[:, None, :]
        system_RII.diagonal(dim1=1, dim2=2).add_(1 - mask_RI)
        lower_RII, failed_R = torch.linalg.cholesky_ex(system_RII)
        if bool(failed_R.any()):
            raise NotPositiveDefinite(
                "the Hessian of the kept inputs is not positive definite",
                where=name,
                do="Give refit a damping of 0.0001, say, or iterations instead of the exact solution.",
            )
        wanted_RI1 = (image_OI[rows] * mask_RI)[..., None]
        solved_OI[rows] = torch.cholesky_solve(wanted_RI1, lower_RII)[..., 0] * mask_RI
    return solved_OI
