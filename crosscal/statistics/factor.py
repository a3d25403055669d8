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
    mean = float(diagonal_I.mean())
    if mean <= 0:
        raise EmptyStatistics("every input of this site was zero", where=name, do="Check the calibration windows.")
    dead_I = diagonal_I == 0
    damped_II = hessian_II.clone()
    damped_II.diagonal().add_(damping * mean)
    if damping == 0:
        damped_II.diagonal().masked_fill_(dead_I, mean)
    lower_II, failed_at = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    if int(failed_at) != 0:
        raise NotPositiveDefinite(
            "the damped Hessian is not positive definite",
            where=name,
            got=f"damping {damping:g}, Cholesky failed at column {hessian_II.shape[0] - int(failed_at)}",
            do=f"Raise damping (to {max(10 * damping, 0.01):g}, say) or calibrate on more tokens than inputs.",
        )
    root_II = lower_II.flip(0, 1)
    identity_II = torch.eye(len(diagonal_I), dtype=hessian_II.dtype, device=hessian_II.device)
    upper_II = torch.linalg.solve_triangular(root_II, identity_II, upper=True)
    if not torch.isfinite(upper_II).all():
        raise NotPositiveDefinite(
            "the damped Hessian is singular", where=name, got=f"damping {damping:g}", do="Raise damping."
        )
    return InverseFactor(upper_II, damping, dead_I)
