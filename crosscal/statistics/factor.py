"""The damped inverse Cholesky factor that SparseGPT and GPTQ walk along. Shapes: I inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.errors import EmptyStatistics, NotFinite, NotPositiveDefinite


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """U, upper triangular, with (H + λ I)⁻¹ = Uᵀ U and λ = damping · mean(diag H)."""

    upper_II: Tensor
    damping: float
    """λ as a fraction of the Hessian's mean diagonal."""
    dead_I: Tensor
    """Inputs that were always zero: H_jj = 0."""


def factor(hessian_II: Tensor, damping: float = 0.01, *, name: str = "hessian") -> InverseFactor:
    """Factor the inverse of a damped Hessian with one Cholesky and one triangular solve.

    With J the exchange matrix, J (H + λI) J = L Lᵀ gives H + λI = R Rᵀ for the upper triangular R = J L J, so U = R⁻¹.
    A dead input (H_jj = 0) is uncoupled from all others, so its unit only needs to be positive; without damping it
    gets the mean diagonal. Raises `NotFinite`, `EmptyStatistics` (all inputs dead), `NotPositiveDefinite`; nothing
    is ever substituted.
    """
    if not torch.isfinite(hessian_II).all():
        raise NotFinite("the Hessian is not finite", where=name, do="Calibrate in float32 or bfloat16.")
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    if dead_I.all():
        raise EmptyStatistics("every input of this site was zero", where=name, do="Check the calibration windows.")
    mean = float(diagonal_I.mean(dtype=torch.float64))
    reversed_II = hessian_II.flip(0, 1)
    reversed_II.diagonal().add_(damping * mean)
    if damping == 0:
        reversed_II.diagonal().masked_fill_(dead_I.flip(0), mean)
    lower_II, failed_at = torch.linalg.cholesky_ex(reversed_II)
    if int(failed_at) != 0:
        column = len(hessian_II) - int(failed_at)  # the reversed matrix was factored from the last column on
        raise _not_positive_definite(name, damping, f"Cholesky failed at column {column}")
    identity_II = torch.eye(len(hessian_II), dtype=hessian_II.dtype, device=hessian_II.device)
    upper_II = torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
    if not torch.isfinite(upper_II).all():
        raise _not_positive_definite(name, damping, "its inverse overflows")
    return InverseFactor(upper_II, damping, dead_I)


def _not_positive_definite(name: str, damping: float, why: str) -> NotPositiveDefinite:
    return NotPositiveDefinite(
        "the damped Hessian is not positive definite",
        where=name,
        got=f"damping {damping:g}, {why}",
        do=f"Raise damping (to {max(10 * damping, 0.01):g}, say) or calibrate on more tokens than inputs.",
    )
