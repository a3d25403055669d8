"""Quantized weights are exactly those that a loader computes from the stored integers and scales."""

from __future__ import annotations

import pytest
import torch

from crosscal.compressors import GPTQ, Compressor, LayerProblem, RoundToNearest, SparseGPTQ, Sparsity
from tests.helpers.problems import layer, reference_grid

HALF = Sparsity.parse(0.5)
OUTPUTS, INPUTS = 12, 192
CASES: list[Compressor] = [
    *(RoundToNearest(bits, group) for bits in range(2, 9) for group in (64, None)),
    *(GPTQ(bits, group, order) for bits in (2, 3, 4, 8) for group in (16, 64, None) for order in (False, True)),
    *(SparseGPTQ(HALF, bits, group) for bits in (2, 4, 8) for group in (32, None)),
]


@pytest.mark.parametrize("stored_dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_is_ints_times_scale(case: Compressor, stored_dtype: torch.dtype | None) -> None:
    problem = layer(OUTPUTS, INPUTS, seed=3, dtype=torch.float32, stored_dtype=stored_dtype)
    solution = case.compress(problem)
    grid = solution.grid
    assert grid is not None
    columns = grid.group_size or INPUTS
    assert grid.ints_OI.dtype == torch.int8
    assert grid.ints_OI.shape == (OUTPUTS, INPUTS)
    assert grid.scale_OG.shape == (OUTPUTS, INPUTS // columns)
    assert (grid.scale_OG > 0).all()
    assert int(grid.ints_OI.min()) >= -(2 ** (grid.bits - 1))
    assert int(grid.ints_OI.max()) <= 2 ** (grid.bits - 1) - 1
    loaded = stored_dtype or torch.float32  # a loader multiplies in the stored dtype
    scale_OI = grid.scale_OG.to(loaded).repeat_interleave(columns, dim=1)
    assert torch.equal(scale_OI.float()[:, ::columns], grid.scale_OG)
    assert torch.equal(solution.weight_OI, (grid.ints_OI.to(loaded) * scale_OI).float())
    assert torch.equal(solution.weight_OI == 0, grid.ints_OI == 0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [32, None])
def test_rounding_goes_to_the_nearest_level(bits: int, group_size: int | None) -> None:
    """Compare with the nearest of all levels of the grid, and scales with their formula."""
    problem = layer(4, 96, seed=4)
    solution = RoundToNearest(bits, group_size).compress(problem)
    assert solution.grid is not None
    columns = group_size or 96
    scale_OG = torch.stack([reference_grid(part, bits) for part in problem.weight_OI.split(columns, 1)], 1)
    torch.testing.assert_close(solution.grid.scale_OG, scale_OG, rtol=1e-15, atol=0)
    levels_L = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    grid_OIL = levels_L * scale_OG.repeat_interleave(columns, dim=1)[:, :, None]
    best_OI = (grid_OIL - problem.weight_OI[:, :, None]).abs().amin(2)
    distance_OI = (solution.weight_OI - problem.weight_OI).abs()
    torch.testing.assert_close(distance_OI, best_OI, rtol=1e-12, atol=1e-15)
    # half a step; outermost weights are off by up to 10⁻⁶ of their size, 128 / 10⁶ steps, more
    assert (distance_OI <= scale_OG.repeat_interleave(columns, dim=1) * 0.5 * (1 + 3e-4)).all()


def test_activation_order_keeps_groups_where_they_are_on_disk() -> None:
    """Each scale is that of `group_size` adjacent inputs of the original weight, in any order of rounding."""
    problem = layer(OUTPUTS, INPUTS, seed=5)
    solution = GPTQ(4, 64, activation_order=True, scale_search=False).compress(problem)
    assert solution.grid is not None
    scale_OG = torch.stack([reference_grid(part, 4) for part in problem.weight_OI.split(64, 1)], 1)
    torch.testing.assert_close(solution.grid.scale_OG, scale_OG, rtol=1e-15, atol=0)
    assert not torch.equal(solution.weight_OI, GPTQ(4, 64, False, False).compress(problem).weight_OI)


def test_activation_order_is_permutation_equivariant() -> None:
    """With one scale per row and activation order, permuting the inputs permutes the solution."""
    problem = layer(OUTPUTS, INPUTS, seed=6)
    order_I = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(0))
    shuffled = LayerProblem("shuffled", problem.weight_OI[:, order_I], problem.hessian_II[order_I][:, order_I])
    method = GPTQ(3, None, activation_order=True)
    torch.testing.assert_close(
        method.compress(shuffled).weight_OI, method.compress(problem).weight_OI[:, order_I], rtol=1e-10, atol=1e-10
    )


def test_rows_of_a_layer_are_solved_alone() -> None:
    problem = layer(OUTPUTS, INPUTS, seed=7)
    for method in (GPTQ(3, 32, False), GPTQ(3, None), GPTQ(3, 32, True), RoundToNearest(3, 32)):
        one = LayerProblem("row", problem.weight_OI[4:5], problem.hessian_II)
        torch.testing.assert_close(
            method.compress(one).weight_OI[0], method.compress(problem).weight_OI[4], rtol=1e-10, atol=1e-10
        )
    louder = LayerProblem("louder", problem.weight_OI * torch.arange(1, 13)[:, None], problem.hessian_II)
    for method in (GPTQ(3, None), RoundToNearest(3, None)):  # one scale per row
        torch.testing.assert_close(
            method.compress(louder).weight_OI, method.compress(problem).weight_OI * torch.arange(1, 13)[:, None]
        )


@pytest.mark.parametrize("method", [RoundToNearest(4, 32), GPTQ(4, 32, False), GPTQ(4, 32, True)], ids=str)
def test_a_group_of_zeros_has_scale_one(method: Compressor) -> None:
    problem = layer(OUTPUTS, INPUTS, seed=8)
    weight_OI = problem.weight_OI.clone()
    weight_OI[:, :32] = 0.0
    solution = method.compress(LayerProblem("zeros", weight_OI, problem.hessian_II))
    assert solution.grid is not None
    if not isinstance(method, GPTQ) or not method.activation_order:  # there, errors of other groups reach this one
        assert not solution.weight_OI[:, :32].any()
    assert (solution.grid.scale_OG[:, 0] == 1).all()


def test_more_bits_cost_less() -> None:
    problem = layer(OUTPUTS, INPUTS, seed=9)
    for method in (RoundToNearest, GPTQ):
        losses = [method(bits, 64).compress(problem).loss for bits in range(2, 9)]
        assert losses == sorted(losses, reverse=True)
