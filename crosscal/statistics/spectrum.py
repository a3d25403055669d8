"""Effective rank and condition number of a Hessian. Shapes: I inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.errors import EmptyStatistics


@dataclass(frozen=True)
class Spectrum:
    """Summary of a Hessian's eigenvalues, invariant under c · H and under Q H Qᵀ with an orthogonal Q."""

    effective_rank: float
    """exp of the entropy of λ_i / Σ λ (Roy & Vetterli, EUSIPCO 2007): n for n equal eigenvalues, others zero."""
    condition: float
    """Largest over smallest eigenvalue of H + damping · mean(diag H) · I, which solvers factor; at most
    1 + I / damping."""


def spectrum(hessian_II: Tensor, damping: float = 0.01) -> Spectrum:
    """Decompose a Hessian, in float64. Raises `EmptyStatistics` if it is all zeros."""
    value_I = torch.linalg.eigvalsh(hessian_II.double()).clamp_min(0.0)
    total = float(value_I.sum())
    if total == 0:
        raise EmptyStatistics("every input of this site was zero")
    share_I = value_I / total
    entropy = -float(torch.special.xlogy(share_I, share_I).sum())
    shift = damping * total / len(value_I)
    least = float(value_I[0]) + shift
    return Spectrum(math.exp(entropy), (float(value_I[-1]) + shift) / least if least else math.inf)
