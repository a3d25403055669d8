"""Decompositions of the damped Hessian for solvers: a Cholesky factor, an eigensystem. Shapes: I inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crosscal.errors import EmptyStatistics, NotFinite, NotPositiveDefinite, UsageError
from crosscal.statistics.finite import all_finite


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """The factor R of a damped Hessian: upper triangular, H + λ I = R Rᵀ, λ = damping · mean(diag H).

    The papers use its inverse U = R⁻¹, the factor of the inverse: (H + λ I)⁻¹ = Uᵀ U. R itself suffices: the errors of
    the columns before j change column j by D_{<j} R_{<j,j} / R_jj, where D is the change of those columns (LDLQ, Chee
    et al. 2023, arXiv 2307.13304, who show that it is equivalent to GPTQ). So no large matrix is inverted.
    """

    root_II: Tensor
    damping: float
    """λ as a fraction of the Hessian's mean diagonal."""
    shift: float
    """λ, which was added to the diagonal."""
    dead_I: Tensor
    """Inputs that were always zero: H_jj = 0."""

    @cached_property
    def upper_II(self) -> Tensor:
        """U = R⁻¹, upper triangular."""
        identity_II = torch.eye(len(self.root_II), dtype=self.root_II.dtype, device=self.root_II.device)
        return torch.linalg.solve_triangular(self.root_II, identity_II, upper=True)


@dataclass(frozen=True, eq=False)
class Eigensystem:
    """The damped Hessian scaled to a unit diagonal: S⁻¹ (H + λ I) S⁻¹ = Q diag(values) Qᵀ, S = diag(scale).

    The scaled problem approximates W S. A dead input (H_jj = 0) is coupled to no other; its scale is √λ, or 1 if λ = 0.
    """

    values_I: Tensor
    vectors_II: Tensor
    scale_I: Tensor
    damping: float
    """λ as a fraction of the Hessian's mean diagonal."""
    dead_I: Tensor
    """Inputs that were always zero: H_jj = 0."""


def check_damping(damping: float) -> None:
    """Raise `UsageError` for a damping that is negative, infinite or NaN."""
    if not 0 <= damping < math.inf:
        raise UsageError("damping must be a number of at least 0", got=str(damping))


def eigensystem(hessian_II: Tensor, damping: float = 0.01, *, name: str = "hessian") -> Eigensystem:
    """Decompose a damped Hessian, λ = damping · mean(diag H). Raises what `factor` raises."""
    mean = _mean_square(hessian_II, name)
    shifted_II = hessian_II.clone()
    shifted_II.diagonal().add_(damping * mean)
    square_I = shifted_II.diagonal()
    scale_I = torch.where(square_I > 0, square_I, torch.ones_like(square_I)).sqrt()
    values_I, vectors_II = torch.linalg.eigh(shifted_II / scale_I / scale_I[:, None])
    if not all_finite(values_I):
        raise _not_positive_definite(name, damping, "its eigenvalues are not finite")
    return Eigensystem(values_I.clamp_min(0), vectors_II, scale_I, damping, hessian_II.diagonal() == 0)


def factor(hessian_II: Tensor, damping: float = 0.01, *, name: str = "hessian") -> InverseFactor:
    """Factor a damped Hessian with one Cholesky, from the last input to the first.

    With J the exchange matrix, J (H + λI) J = L Lᵀ gives H + λI = R Rᵀ for the upper triangular R = J L J. A dead
    input (H_jj = 0) is uncoupled from all others, so its pivot only needs to be positive; without damping it gets the
    mean diagonal. Raises `NotFinite`, `EmptyStatistics` (all inputs dead), `NotPositiveDefinite`; there is no
    fallback.
    """
    mean = _mean_square(hessian_II, name)
    dead_I = hessian_II.diagonal() == 0
    reversed_II = hessian_II.flip(0, 1)
    reversed_II.diagonal().add_(damping * mean)
    if damping == 0:
        reversed_II.diagonal().masked_fill_(dead_I.flip(0), mean)
    lower_II, failed_at = torch.linalg.cholesky_ex(reversed_II)
    del reversed_II  # at most three matrices are held, the Hessian included
    if int(failed_at) != 0:
        column = len(hessian_II) - int(failed_at)  # the reversed matrix is factored from the last column on
        raise _not_positive_definite(name, damping, f"Cholesky failed at column {column}")
    root_II = lower_II.flip(0, 1)
    if not all_finite(root_II.diagonal().reciprocal()):
        raise _not_positive_definite(name, damping, "its inverse overflows")
    return InverseFactor(root_II, damping, damping * mean, dead_I)


def _mean_square(hessian_II: Tensor, name: str) -> float:
    """Return the mean of the diagonal, after checking that the matrix is finite and has a nonzero diagonal."""
    if not all_finite(hessian_II):
        raise NotFinite("the Hessian is not finite", where=name, do="Calibrate in float32 or bfloat16.")
    if not hessian_II.diagonal().any():
        do = "Are the windows empty, or is a matrix before it zero in the checkpoint?"
        raise EmptyStatistics("every input of this site was zero", where=name, do=do)
    return float(hessian_II.diagonal().mean(dtype=torch.float64))


def _not_positive_definite(name: str, damping: float, why: str) -> NotPositiveDefinite:
    return NotPositiveDefinite(
        "the damped Hessian is not positive definite",
        where=name,
        got=f"damping {damping:g}, {why}",
        do=f"Raise damping (to {max(10 * damping, 0.01):g}, say) or calibrate on more tokens than inputs.",
    )
