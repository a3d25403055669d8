"""3BASiL: replace a matrix by the sum of a sparse and a low-rank matrix, optimised jointly.

    minimise tr((W - D - L) (H + λI) (W - D - L)ᵀ)  over D with at most k entries and L of rank r

by an alternating direction method (ADMM) with three blocks: B free, D sparse, L low rank,

    B ← ((W - L) H - V + ρ D) (H + ρI)⁻¹,   D ← the k largest of B + V / ρ,   V ← V + ρ (B - D),   L ← best for W - B

Makni et al. 2025 (arXiv 2603.01376), the layer-wise part; their gradient refinement of whole transformer blocks is not
implemented. Here L is updated by one step of subspace iteration instead of an eigendecomposition, inputs are scaled to
H_jj = 1, and conjugate gradients on the support, alternated with an exact L, finish. The penalty is the authors', but
they count weights that leave the support and weights that join it, here only the latter: the thresholds of `GROWTH` are
twice theirs, which gave .6 to 1.9 % higher losses in the same time (random layers).

Shapes: O outputs, I inputs, K rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.alps import resolvent
from crosscal.compressors.eora import best_low_rank
from crosscal.compressors.recipe import alone
from crosscal.compressors.refit import conjugate_gradients_OI, damped_II
from crosscal.compressors.selection import count_true
from crosscal.compressors.sparsity import Sparsity, pruned
from crosscal.compressors.state import Layer, Site, Statistic
from crosscal.errors import UsageError
from crosscal.statistics.factor import Eigensystem, check_damping

PENALTY = 0.1
GROWTH = ((0.1, 1.1), (0.005, 1.05), (0.0, 1.02))
"""(fraction, factor): every tenth iteration, the penalty grows by `factor` if over `fraction` of the support moved."""
CHECKED_EVERY = 10
SETTLED, LEAST_ITERATIONS = 3e-4, 100
CLOSING_ROUNDS = 3


@dataclass(frozen=True)
class SparseLowRank:
    sparsity: Sparsity
    """Fraction removed from the sparse part, or n:m."""
    rank: int = 32
    """Rank of the low-rank part."""
    iterations: int = 300
    """Maximum number."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 2
    has_low_rank: ClassVar = True
    compress = alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))
        if self.rank < 1 or self.iterations < 1:
            got = f"rank {self.rank}, iterations {self.iterations}"
            raise UsageError("rank and iterations are at least 1", got=got, do="`alps` has no low-rank part.")
        check_damping(self.damping)

    def __call__(self, site: Site) -> Site:
        eigen = site.statistics.eigensystem(self.damping)
        hessian_II = damped_II(site.statistics.hessian_II, self.damping)
        return site.each(lambda layer: self._solve(layer, eigen, hessian_II))

    def _solve(self, layer: Layer, eigen: Eigensystem, hessian_II: Tensor) -> Layer:
        self.sparsity.check(layer.target_OI.shape[1], layer.name)
        if self.sparsity.fraction == 0:
            return layer
        keep_OI, low_OI = self._support(layer, eigen)
        keep_OI = keep_OI if layer.keep_OI is None else keep_OI & layer.keep_OI
        target_OI, sparse_OI, low_rank = layer.target_OI, torch.zeros_like(layer.target_OI), None
        for _ in range(CLOSING_ROUNDS):
            sparse_OI = conjugate_gradients_OI(target_OI - low_OI, sparse_OI, keep_OI, hessian_II, 10)
            low_rank = best_low_rank(target_OI - sparse_OI, hessian_II, self.rank)
            low_OI = low_rank.weight_OI
        layer = pruned(layer, keep_OI, sparse_OI, damping=self.damping)
        return dataclasses.replace(layer, low_rank=low_rank)

    def _support(self, layer: Layer, eigen: Eigensystem) -> tuple[Tensor, Tensor]:
        """Return (mask, L) of the scaled problem, L scaled back."""
        target_OI = layer.target_OI * eigen.scale_I
        hessian_II = (eigen.vectors_II * eigen.values_I) @ eigen.vectors_II.mT
        usable_OI = (~eigen.dead_I).to(target_OI)  # weights of dead inputs are pruned first
        usable_OI = usable_OI if layer.keep_OI is None else usable_OI * layer.keep_OI
        keep_OI = self._project(layer, target_OI, usable_OI)
        sparse_OI, multiplier_OI, before_OI = torch.where(keep_OI, target_OI, 0.0), torch.zeros_like(target_OI), keep_OI
        penalty, size, inverse = PENALTY, max(1, count_true(keep_OI)), resolvent(eigen, PENALTY, len(target_OI))
        image_OI, basis_OK, right_KI = target_OI @ hessian_II, None, target_OI.new_zeros(self.rank, len(hessian_II))
        left_image_OI = image_OI  # (W - L) H, by the factors of L: a product of rank r instead of one with all of H
        for iteration in range(1, self.iterations + 1):
            dense_OI = inverse(left_image_OI - multiplier_OI + penalty * sparse_OI)
            raised_OI = dense_OI + multiplier_OI / penalty
            keep_OI = self._project(layer, raised_OI, usable_OI)
            sparse_OI = raised_OI * keep_OI
            multiplier_OI = (raised_OI - sparse_OI).mul_(penalty)
            basis_OK = _next_basis_OK(target_OI - dense_OI, hessian_II, self.rank, basis_OK)
            right_KI = basis_OK.mT @ (target_OI - dense_OI)
            left_image_OI = image_OI - basis_OK @ (right_KI @ hessian_II)
            if iteration % CHECKED_EVERY:
                continue
            change, before_OI = count_true(keep_OI & ~before_OI) / size, keep_OI
            if change <= SETTLED and iteration >= LEAST_ITERATIONS:
                break
            growth = next((factor for least, factor in GROWTH if change > least), 1.0)
            if growth > 1:
                penalty *= growth
                inverse = resolvent(eigen, penalty, len(target_OI))
        assert basis_OK is not None, "there is at least one iteration"
        return keep_OI, (basis_OK @ right_KI) / eigen.scale_I

    def _project(self, layer: Layer, value_OI: Tensor, usable_OI: Tensor) -> Tensor:
        return self.sparsity.keep_OI(value_OI.abs().mul_(usable_OI), per="matrix", name=layer.name)


def _next_basis_OK(difference_OI: Tensor, hessian_II: Tensor, rank: int, basis_OK: Tensor | None) -> Tensor:
    """One step of subspace iteration towards the top eigenvectors of Δ H Δᵀ; without a basis, these themselves."""
    if basis_OK is None:
        return best_low_rank(difference_OI, hessian_II, rank).left_OK
    return torch.linalg.qr(difference_OI @ (hessian_II @ (difference_OI.mT @ basis_OK))).Q
