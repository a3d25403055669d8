"""Swaps: exchange kept for removed weights where this lowers the loss, row by row, at the same sparsity.

With E = W - V and G = E H, removing weight k and then giving weight u its optimal value changes a row's loss by

    2 v_k G_k + v_k² H_kk  -  (G_u + v_k H_ku)² / H_uu

Every round makes the best exchange of each row that has one with a gain. It starts from any mask and any values.
SparseSwaps (Zimmer et al. 2025, arXiv 2512.10922) exchanges weights at their dense values; here the weight that returns
gets its optimal value, so updated weights (SparseGPT, refit) never get worse. Per row only the `candidates` cheapest
removals and best returns are paired; the paper pairs all.

Shapes: O outputs, I inputs, C candidates, N groups of M inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosscal.compressors.recipe import alone, check_inputs
from crosscal.compressors.sparsity import pruned
from crosscal.compressors.state import Dense, Layer, Site, Statistic
from crosscal.errors import UsageError

LEAST_GAIN = 1e-6
"""Smallest gain relative to the cost of the removal; a smaller one may be roundoff."""


@dataclass(frozen=True)
class Swaps:
    rounds: int = 100
    """Maximum rounds, each with at most one exchange per row; stops early when no row gains."""
    candidates: int = 32
    """Number of removals, and of returns, per row that are paired."""
    group: int | None = None
    """Exchange only inside groups of this many inputs: m of an n:m mask."""

    kind: ClassVar = "refine"
    needs: ClassVar = frozenset({Statistic.GRAM})
    version: ClassVar = 1
    changes_mask: ClassVar = True
    compress = alone

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.candidates < 1:
            got = f"rounds {self.rounds}, candidates {self.candidates}"
            raise UsageError("rounds are 0 or more, candidates at least 1", got=got)
        if self.group is not None and self.group < 1:
            raise UsageError("group is at least 1", got=str(self.group), do="null means no groups.")

    def __call__(self, site: Site) -> Site:
        return site.each(lambda layer: self._swap(layer, site.statistics.hessian_II))

    def _swap(self, layer: Layer, hessian_II: Tensor) -> Layer:
        if layer.keep_OI is None or not isinstance(layer.base, Dense):
            return layer  # nothing was pruned, or the weights are on a grid
        check_inputs(self, layer.target_OI.shape[1], layer.name)
        keep_OI, weight_OI = layer.keep_OI.clone(), layer.base.weight_OI.clone()
        pull_OI = (layer.base_target_OI - weight_OI) @ hessian_II
        for _ in range(self.rounds):
            gain_O, out_O, in_O = self._best(weight_OI, keep_OI, pull_OI, hessian_II)
            rows = gain_O.nonzero()[:, 0]
            if not len(rows):
                break
            out_R, in_R = out_O[rows], in_O[rows]
            pull_OI[rows] += weight_OI[rows, out_R][:, None] * hessian_II[out_R]
            back_R = pull_OI[rows, in_R] / hessian_II[in_R, in_R]
            pull_OI[rows] -= back_R[:, None] * hessian_II[in_R]
            weight_OI[rows, out_R], weight_OI[rows, in_R] = 0.0, back_R
            keep_OI[rows, out_R], keep_OI[rows, in_R] = False, True
        # The new mask need not be a subset of the layer's mask.
        return pruned(layer.changed(layer.base, keep_OI=None), keep_OI, weight_OI)

    def _best(
        self, weight_OI: Tensor, keep_OI: Tensor, pull_OI: Tensor, hessian_II: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (gain, removed input, returned input) per row; the gain is 0 if no exchange is worth making."""
        square_I = hessian_II.diagonal()
        cost_OI = (2 * weight_OI * pull_OI + weight_OI.square() * square_I).masked_fill(~keep_OI, torch.inf)
        return_OI = torch.where(keep_OI | (square_I == 0), -torch.inf, pull_OI.square() / square_I.clamp_min(1e-30))
        if self.group is None:
            out_OC = cost_OI.topk(min(self.candidates, cost_OI.shape[1]), dim=1, largest=False).indices
            in_OC = return_OI.topk(min(self.candidates, cost_OI.shape[1]), dim=1).indices
            pairs = _pairs(weight_OI, pull_OI, cost_OI, return_OI, hessian_II, out_OC[:, None], in_OC[:, None])
        else:
            every_NM = torch.arange(len(square_I), device=square_I.device).view(-1, self.group)
            every_ONM = every_NM.expand(len(weight_OI), -1, -1)
            pairs = _pairs(weight_OI, pull_OI, cost_OI, return_OI, hessian_II, every_ONM, every_ONM)
        change_OP, out_OP, in_OP = pairs
        best_O, place_O = change_OP.min(1)
        out_O, in_O = (index_OP.gather(1, place_O[:, None])[:, 0] for index_OP in (out_OP, in_OP))
        removal_O = cost_OI.gather(1, out_O[:, None])[:, 0].abs()
        is_worth_it_O = best_O < -LEAST_GAIN * removal_O
        return torch.where(is_worth_it_O, -best_O, 0.0), out_O, in_O


def _pairs(
    weight_OI: Tensor,
    pull_OI: Tensor,
    cost_OI: Tensor,
    return_OI: Tensor,
    hessian_II: Tensor,
    out_ONC: Tensor,
    in_ONC: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (change of the loss, removed, returned) of all pairs in each of N lists of C candidates, flattened."""
    rows, lists, out = out_ONC.shape

    def at(values_OI: Tensor, index_ONC: Tensor) -> Tensor:
        return values_OI.gather(1, index_ONC.flatten(1)).view_as(index_ONC)

    cross_ONCC = hessian_II[out_ONC[..., :, None], in_ONC[..., None, :]]
    moved_ONCC = at(pull_OI, in_ONC)[..., None, :] + at(weight_OI, out_ONC)[..., :, None] * cross_ONCC
    square_ONC = hessian_II.diagonal()[in_ONC]
    change_ONCC = at(cost_OI, out_ONC)[..., :, None] - moved_ONCC.square() / square_ONC[..., None, :].clamp_min(1e-30)
    usable_ONC = at(return_OI, in_ONC).isfinite()
    change_ONCC = change_ONCC.masked_fill(~usable_ONC[..., None, :], torch.inf)
    shape = (rows, lists, out, in_ONC.shape[2])
    index = (out_ONC[..., :, None].expand(shape).flatten(1), in_ONC[..., None, :].expand(shape).flatten(1))
    return change_ONCC.flatten(1), *index
