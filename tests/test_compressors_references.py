"""Refinements, repairs and ALPS compared with plain float64 references, and with weaker solvers.

Shapes: O outputs, I inputs, K rank.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from crosscal.compressors import (
    ALPS,
    GPTQ,
    Descent,
    EoRA,
    Grid,
    Refit,
    RoundToNearest,
    Scales,
    SparseGPT,
    SparseLowRank,
    Swaps,
    Wanda,
    run,
)
from crosscal.compressors.problem import solved
from crosscal.compressors.recipe import site_of
from tests.helpers.problems import layer, loss_after, true_loss


def test_the_exact_refit_is_the_least_squares_solution_of_every_row() -> None:
    problem = layer(9, 48)
    start = run(site_of([problem]), [SparseGPT(0.6)])
    exact = run(start, [Refit(None)]).layers[0]
    root_II = torch.linalg.cholesky(problem.hessian_II).mT
    for row in range(9):
        keep_I = exact.keep_OI[row]  # pyright: ignore[reportOptionalSubscript]
        best = torch.linalg.lstsq(root_II[:, keep_I], root_II @ problem.weight_OI[row]).solution
        torch.testing.assert_close(exact.weight_OI[row, keep_I], best, rtol=1e-8, atol=1e-8)


def test_conjugate_gradients_come_to_the_exact_solution_and_never_turn_back() -> None:
    problem = layer(9, 48)
    losses = [loss_after(problem, [Wanda(0.6), Refit(iterations)]) for iterations in (0, 1, 2, 3, 5, 10, 60)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(loss_after(problem, [Wanda(0.6), Refit(None)]), rel=1e-9)
    assert losses[0] == pytest.approx(loss_after(problem, [Wanda(0.6)]), rel=1e-12)


def test_swaps_end_where_no_single_exchange_helps() -> None:
    """Try every exchange of a kept for a removed weight, with the optimal value for the restored weight."""
    problem = layer(3, 16)
    hessian_II = problem.hessian_II
    done = run(site_of([problem]), [Wanda(0.5), Swaps(500, candidates=16)]).layers[0]
    assert done.keep_OI is not None
    for row in range(3):
        weight_I, keep_I = done.weight_OI[row], done.keep_OI[row]
        error_I = problem.weight_OI[row] - weight_I
        loss = error_I @ hessian_II @ error_I
        for gone, back in itertools.product(keep_I.nonzero()[:, 0].tolist(), (~keep_I).nonzero()[:, 0].tolist()):
            trial_I = error_I.clone()
            trial_I[gone] = problem.weight_OI[row, gone]
            trial_I[back] -= (trial_I @ hessian_II)[back] / hessian_II[back, back]
            assert trial_I @ hessian_II @ trial_I >= loss * (1 - 1e-5)


def test_swaps_keep_a_pattern() -> None:
    done = run(site_of([layer(8, 64)]), [Wanda("2:4"), Swaps(50, group=4)]).layers[0]
    assert done.keep_OI is not None
    assert (done.keep_OI.view(8, 16, 4).sum(2) == 2).all()
    assert loss_after(layer(8, 64), [Wanda("2:4"), Swaps(50, group=4)]) < loss_after(layer(8, 64), [Wanda("2:4")])


def test_alps_is_the_plain_iteration() -> None:
    """Reference: the iterates B, D and V with explicit inverses, without scaling tricks; the supports must be equal."""
    problem, damping = layer(6, 32), 0.01
    hessian_II = problem.hessian_II + damping * problem.hessian_II.diagonal().mean() * torch.eye(32).double()
    scale_I = hessian_II.diagonal().sqrt()
    h_II, w_OI = hessian_II / scale_I / scale_I[:, None], problem.weight_OI * scale_I
    kept = 6 * 32 - round(0.7 * 6 * 32)

    def largest(x_OI: Tensor) -> Tensor:
        keep = torch.zeros(x_OI.numel(), dtype=torch.bool)
        keep[x_OI.abs().flatten().argsort(descending=True)[:kept]] = True
        return keep.view_as(x_OI)

    def descend(rho: float) -> Tensor | None:
        d_OI, v_OI, before_OI, grown = w_OI * largest(w_OI), torch.zeros_like(w_OI), largest(w_OI), False
        keep_OI = before_OI
        for iteration in range(1, 301):
            b_OI = (w_OI @ h_II - v_OI + rho * d_OI) @ torch.linalg.inv(h_II + rho * torch.eye(32).double())
            keep_OI = largest(b_OI + v_OI / rho)
            d_OI = (b_OI + v_OI / rho) * keep_OI
            v_OI = v_OI + rho * (b_OI - d_OI)
            if iteration % 3 == 0:
                change = int((keep_OI & ~before_OI).sum()) / kept
                before_OI = keep_OI
                if change <= 3e-4 and iteration >= 30:
                    break
                if change == 0 and not grown:
                    return None
                factor = 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1 if change > 0 else 1.0
                grown, rho = grown or factor > 1, rho * factor
        return keep_OI

    expected_OI = next(found for found in (descend(0.1 / 5**n) for n in range(4)) if found is not None)
    assert torch.equal(run(site_of([problem]), [ALPS(0.7)]).layers[0].keep_OI, expected_OI)  # pyright: ignore


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4"])
def test_better_solvers_lose_less(sparsity: float | str) -> None:
    problem = layer(48, 160)
    sparsegpt = loss_after(problem, [SparseGPT(sparsity)])
    refitted = loss_after(problem, [SparseGPT(sparsity), Refit()])
    assert loss_after(problem, [ALPS(sparsity)]) < refitted < sparsegpt
    assert loss_after(problem, [SparseLowRank(sparsity, 8)]) < loss_after(
        problem, [SparseGPT(sparsity), Refit(), EoRA(8)]
    )


def test_alps_counts_in_rows_where_asked() -> None:
    done = run(site_of([layer(8, 40)]), [ALPS(0.6, per="row", iterations=30)]).layers[0]
    assert done.keep_OI is not None
    assert (done.keep_OI.sum(1) == 16).all()


@pytest.mark.parametrize("stored_dtype", [None, torch.bfloat16])
def test_scales_are_the_least_squares_scales_of_every_row(stored_dtype: torch.dtype | None) -> None:
    problem = layer(6, 96, stored_dtype=stored_dtype)
    start = run(site_of([problem]), [GPTQ(3, 32)])
    grid, base = run(start, [Scales()]).layers[0].base, start.layers[0].base
    assert isinstance(grid, Grid)
    assert isinstance(base, Grid)
    assert torch.equal(grid.ints_OI, base.ints_OI)
    root_II = torch.linalg.cholesky(problem.hessian_II).mT
    for row in range(6):
        columns = [
            root_II[:, g * 32 : (g + 1) * 32] @ grid.ints_OI[row, g * 32 : (g + 1) * 32].double() for g in range(3)
        ]
        best_G = torch.linalg.lstsq(torch.stack(columns, 1), root_II @ problem.weight_OI[row]).solution
        if stored_dtype is None:
            torch.testing.assert_close(grid.scale_OG[row], best_G, rtol=1e-5, atol=0)
        else:
            assert torch.equal(grid.scale_OG[row], grid.scale_OG[row].to(stored_dtype).double())


def test_descent_is_coordinate_by_coordinate() -> None:
    problem = layer(4, 96)
    start = run(site_of([problem]), [RoundToNearest(3, 32)])
    grid = start.layers[0].base
    assert isinstance(grid, Grid)
    weight_OI, hessian_II = grid.weight_OI.clone(), problem.hessian_II
    for _, j in itertools.product(range(2), range(96)):
        for row in range(4):
            pull = (problem.weight_OI[row] - weight_OI[row]) @ hessian_II[j]
            scale = grid.scale_OG[row, j // 32]
            wanted = weight_OI[row, j] + pull / hessian_II[j, j]
            weight_OI[row, j] = (wanted / scale).round().clamp(-4, 3) * scale
    torch.testing.assert_close(run(start, [Descent(2)]).layers[0].weight_OI, weight_OI, rtol=1e-9, atol=1e-9)


def test_a_repair_is_the_best_of_its_rank() -> None:
    """Reference: SVD of Δ times a root of H; the remaining loss is the sum of the other singular values squared."""
    problem = layer(12, 40)
    broken = run(site_of([problem]), [RoundToNearest(2, None)])
    difference_OI = problem.weight_OI - broken.layers[0].weight_OI
    root_II = torch.linalg.cholesky(problem.hessian_II)
    left, values, right = torch.linalg.svd(difference_OI @ root_II, full_matrices=False)
    for rank in (1, 3, 12, 50):
        repaired = run(broken, [EoRA(rank)]).layers[0]
        k = min(rank, 12)
        best_OI = torch.linalg.solve_triangular(root_II.mT, (left[:, :k] * values[:k] @ right[:k]).mT, upper=True).mT
        assert repaired.low_rank is not None
        torch.testing.assert_close(repaired.low_rank.weight_OI, best_OI, rtol=1e-6, atol=1e-8)
        assert true_loss(problem, solved(problem, repaired)) == pytest.approx(
            float(values[k:].square().sum()), abs=1e-9
        )
