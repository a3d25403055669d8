"""Exhaustive search over masks and grid points of tiny layers: the optimum is a lower bound for every method.

Rows are independent once the number of weights that each keeps is given, so layers have one row of 6 or 8 inputs.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from crosscal.compressors import GPTQ, LayerProblem, Magnitude, RoundToNearest, SparseGPT, SparseGPTQ, Sparsity, Wanda
from crosscal.compressors.selection import lowest
from tests.helpers.problems import layer

SEEDS = range(40)
NO_DAMPING = 0.0  # so that method and search minimise the same function


def best_masked_loss(problem: LayerProblem, masks: list[tuple[int, ...]]) -> float:
    """Return the least loss over masks with optimal remaining weights: removing S costs w_S (H⁻¹_SS)⁻¹ w_Sᵀ."""
    inverse_II = torch.linalg.inv(problem.hessian_II)
    return min(
        float(problem.weight_OI[0, removed] @ torch.linalg.solve(block_SS, problem.weight_OI[0, removed]))
        for removed, block_SS in ((list(mask), inverse_II[list(mask)][:, list(mask)]) for mask in masks)
    )


def halves() -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(8), 4))


def two_of_fours() -> list[tuple[int, ...]]:
    pairs = list(itertools.combinations(range(4), 2))
    return [(*left, *(4 + i for i in right)) for left, right in itertools.product(pairs, pairs)]


def repaired_loss(problem: LayerProblem, weight_OI: Tensor) -> float:
    """Return the loss of a solution's mask with the optimal remaining weights."""
    return best_masked_loss(problem, [tuple((weight_OI[0] == 0).nonzero().flatten().tolist())])


def test_the_searched_cost_is_least_squares() -> None:
    """Compare the closed form with the least-squares solution for the remaining weights."""
    problem = layer(1, 8, seed=3)
    for removed in ((0, 1, 2, 3), (1, 4, 6, 7)):
        kept = [i for i in range(8) if i not in removed]
        hessian_II, weight_I = problem.hessian_II, problem.weight_OI[0]
        survivors = torch.linalg.solve(hessian_II[kept][:, kept], (hessian_II @ weight_I)[kept])
        difference_I = weight_I.clone()
        difference_I[kept] -= survivors
        assert float(difference_I @ hessian_II @ difference_I) == pytest.approx(
            best_masked_loss(problem, [removed]), rel=1e-10
        )


@pytest.mark.parametrize(("pattern", "masks"), [(0.5, halves()), ("2:4", two_of_fours())], ids=["4 of 8", "2:4"])
def test_no_mask_beats_the_optimum_and_sparsegpt_comes_near(pattern: float | str, masks: list[tuple[int, ...]]) -> None:
    """Measured loss / optimal loss, geometric means of 40 seeds: SparseGPT 1.81 (2:4: 1.79), Wanda 2.81 (2.89),
    magnitude 7.40 (6.62). No ratio can be below 1; the bounds on the means are expectations for these seeds."""
    sparsity = Sparsity.parse(pattern)
    methods = [SparseGPT(sparsity, damping=NO_DAMPING), Wanda(sparsity), Magnitude(sparsity)]
    ratios: list[list[float]] = []
    for seed in SEEDS:
        problem = layer(1, 8, seed=seed)
        best = best_masked_loss(problem, masks)
        assert best > 0
        solutions = [method.compress(problem) for method in methods]
        ratios.append([solution.loss / best for solution in solutions])
        for solution in solutions:
            repaired = repaired_loss(problem, solution.weight_OI)
            assert best * (1 - 1e-9) <= repaired <= solution.loss * (1 + 1e-9)
    sparsegpt, wanda, magnitude = torch.tensor(ratios).log().mean(0).exp().tolist()
    assert sparsegpt < 2.0 < wanda < magnitude


def grid_optimum(problem: LayerProblem, scale: float, *, zeros: int = 0) -> float:
    """Return the least loss over all rows of 2-bit integers times one scale, with at least `zeros` zeros."""
    levels_LI = torch.cartesian_prod(*[torch.arange(-2.0, 2.0, dtype=torch.float64)] * problem.weight_OI.shape[1])
    levels_LI = levels_LI[(levels_LI == 0).sum(1) >= zeros]
    difference_LI = problem.weight_OI - scale * levels_LI
    return float(torch.einsum("li,ij,lj->l", difference_LI, problem.hessian_II, difference_LI).min())


def test_no_rounding_beats_the_optimum_and_gptq_comes_near() -> None:
    """On each method's own scales, measured as above: GPTQ in plain order without scale search 1.55, with activation
    order and scale search 1.13, both undamped; RTN 2.66."""
    plain = GPTQ(2, None, activation_order=False, scale_search=False, damping=NO_DAMPING)
    ratios: list[list[float]] = []
    for seed in SEEDS:
        problem = layer(1, 6, seed=seed)
        row: list[float] = []
        for method in (plain, GPTQ(2, None, damping=NO_DAMPING), RoundToNearest(2, None)):
            solution = method.compress(problem)
            assert solution.grid is not None
            best = grid_optimum(problem, float(solution.grid.scale_OG))
            assert solution.loss >= best * (1 - 1e-9)
            row.append(solution.loss / best)
        ratios.append(row)
    gptq, ordered, nearest = torch.tensor(ratios).log().mean(0).exp().tolist()
    assert ordered < 1.2
    assert gptq < 1.7 < nearest


def test_no_sparse_rounding_beats_the_optimum() -> None:
    ratios: list[float] = []
    for seed in SEEDS:
        problem = layer(1, 6, seed=seed)
        solution = SparseGPTQ(Sparsity.parse(0.5), 2, None, damping=NO_DAMPING).compress(problem)
        assert solution.grid is not None
        best = grid_optimum(problem, float(solution.grid.scale_OG), zeros=3)
        assert solution.loss >= best * (1 - 1e-9)
        ratios.append(solution.loss / best)
    assert torch.tensor(ratios).log().mean().exp() < 1.5


def test_one_removal_is_optimal_brain_surgeon_on_the_columns_still_to_come() -> None:
    """Removing weight p costs w_p² / [(H_p:,p:)⁻¹]_pp: columns before p are fixed and cannot compensate."""
    for seed in range(5):
        problem = layer(1, 8, seed=seed)
        solution = SparseGPT(Sparsity.parse(1 / 8), damping=NO_DAMPING).compress(problem)
        removed = int((solution.weight_OI[0] == 0).nonzero())
        suffix_I = torch.stack([torch.linalg.inv(problem.hessian_II[j:, j:])[0, 0] for j in range(8)])
        assert removed == int(lowest(problem.weight_OI[0].square() / suffix_I, 1).nonzero())
        suffix_loss = float(problem.weight_OI[0, removed].square() / suffix_I[removed])
        assert solution.loss == pytest.approx(suffix_loss, rel=1e-9)
