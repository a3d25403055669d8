"""The column loop against a plain implementation of its recursion, and identities that it must satisfy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crosscal.compressors import GPTQ, Magnitude, RoundToNearest, SparseGPT, SparseGPTQ, Sparsity, Wanda, solve_many
from crosscal.compressors.selection import lowest
from crosscal.errors import NotPositiveDefinite, StatisticsError
from crosscal.statistics import factor
from tests.helpers.problems import BLOCK, layer, reference_columns, true_loss, with_hessian

F64 = torch.float64


def eye(inputs: int) -> torch.Tensor:
    return torch.eye(inputs, dtype=F64)


@pytest.mark.parametrize("inputs", [1, 31, 128, 160, 290])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_sparsegpt_is_the_plain_recursion(inputs: int, fraction: float) -> None:
    problem = layer(9, inputs, seed=inputs)
    weight_OI = SparseGPT(Sparsity.parse(fraction), damping=0.02).compress(problem).weight_OI
    expected_OI = reference_columns(problem, fraction=fraction, damping=0.02)
    assert torch.equal(weight_OI == 0, expected_OI == 0)
    torch.testing.assert_close(weight_OI, expected_OI, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (1, 2), (7, 16)])
def test_sparsegpt_patterns_are_the_plain_recursion(kept: int, group: int) -> None:
    problem = layer(9, 272, seed=group)
    weight_OI = SparseGPT(Sparsity.parse(f"{kept}:{group}")).compress(problem).weight_OI
    expected_OI = reference_columns(problem, kept_of=(kept, group))
    assert torch.equal(weight_OI == 0, expected_OI == 0)
    torch.testing.assert_close(weight_OI, expected_OI, rtol=1e-9, atol=1e-9)


def test_sparsegpt_with_dead_inputs_is_the_plain_recursion() -> None:
    problem = layer(9, 160, seed=4, dead=[0, 7, 8, 129])
    for fraction in (0.02, 0.5):
        weight_OI = SparseGPT(Sparsity.parse(fraction)).compress(problem).weight_OI
        torch.testing.assert_close(weight_OI, reference_columns(problem, fraction=fraction), rtol=1e-9, atol=1e-9)


GROUPS: list[int | None] = [None, 1, 16, 24, 32, 48, 64, 96, 128, 144, 192, 288]


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("scale_search", [False, True])
def test_gptq_is_the_plain_recursion(group_size: int | None, activation_order: bool, scale_search: bool) -> None:
    """Also for groups that straddle panels and blocks."""
    problem = layer(5, 384 if group_size in (64, 128, 192) else 288, seed=11)
    settings: dict[str, Any] = {"bits": 3, "group_size": group_size, "activation_order": activation_order}
    settings["scale_search"] = scale_search
    weight_OI = GPTQ(**settings).compress(problem).weight_OI
    torch.testing.assert_close(weight_OI, reference_columns(problem, **settings), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_bits_are_the_plain_recursion(bits: int) -> None:
    problem = layer(5, 160, seed=12)
    expected_OI = reference_columns(problem, bits=bits, group_size=32)
    torch.testing.assert_close(
        GPTQ(bits, 32, False, False).compress(problem).weight_OI, expected_OI, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("group_size", [None, 32, 96])
@pytest.mark.parametrize("mask", [{"fraction": 0.4}, {"kept_of": (2, 4)}])
@pytest.mark.parametrize("scale_search", [False, True])
def test_both_at_once_is_the_plain_recursion(group_size: int | None, mask: dict[str, Any], scale_search: bool) -> None:
    problem = layer(5, 288, seed=13)
    sparsity = Sparsity.parse(0.4 if "fraction" in mask else "2:4")
    weight_OI = SparseGPTQ(sparsity, 4, group_size, scale_search).compress(problem).weight_OI
    expected_OI = reference_columns(problem, bits=4, group_size=group_size, scale_search=scale_search, **mask)
    torch.testing.assert_close(weight_OI, expected_OI, rtol=1e-9, atol=1e-9)


def test_no_pruning_leaves_gptq_and_many_bits_leave_sparsegpt() -> None:
    problem = layer()
    none, half = Sparsity.parse(0.0), Sparsity.parse(0.5)
    gptq = GPTQ(4, 32, activation_order=False)
    assert torch.equal(SparseGPTQ(none, 4, 32).compress(problem).weight_OI, gptq.compress(problem).weight_OI)
    fine, pruned = SparseGPTQ(half, 8, 16).compress(problem), SparseGPT(half).compress(problem)
    assert fine.loss == pytest.approx(pruned.loss, rel=0.02)


@pytest.mark.parametrize(
    "compressor",
    [SparseGPT(Sparsity.parse(0.5)), SparseGPT(Sparsity.parse("2:4")), GPTQ(3, 32, False), GPTQ(3, 32, True)],
)
def test_the_scale_of_the_hessian_does_not_matter(compressor: Any) -> None:
    problem = layer()
    solution = compressor.compress(problem)
    louder = compressor.compress(with_hessian(problem, 4096 * problem.hessian_II))
    assert torch.equal(solution.weight_OI == 0, louder.weight_OI == 0)
    torch.testing.assert_close(louder.weight_OI, solution.weight_OI, rtol=1e-10, atol=1e-10)
    assert louder.loss == pytest.approx(4096 * solution.loss, rel=1e-10)


@pytest.mark.parametrize("inputs", [64, 128, 200])
def test_uncorrelated_inputs_make_sparsegpt_magnitude_per_block(inputs: int) -> None:
    problem = with_hessian(layer(7, inputs), eye(inputs))
    weight_OI = SparseGPT(Sparsity.parse(0.5)).compress(problem).weight_OI
    expected_OI = problem.weight_OI.clone()
    for start in range(0, inputs, BLOCK):
        part_OB = expected_OI[:, start : start + BLOCK]
        part_OB[lowest(part_OB.abs(), part_OB.numel() // 2)] = 0.0
    assert torch.equal(weight_OI, expected_OI)
    if inputs <= BLOCK:
        assert torch.equal(weight_OI, Magnitude(Sparsity.parse(0.5)).compress(problem).weight_OI)


def test_uncorrelated_inputs_make_patterns_magnitude() -> None:
    problem = with_hessian(layer(7, 200), eye(200))
    pattern = Sparsity.parse("2:4")
    assert torch.equal(SparseGPT(pattern).compress(problem).weight_OI, Magnitude(pattern).compress(problem).weight_OI)


@pytest.mark.parametrize("stored_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 8, 40])
def test_uncorrelated_inputs_make_gptq_round_to_nearest(
    stored_dtype: torch.dtype | None, activation_order: bool, group_size: int | None
) -> None:
    problem = with_hessian(layer(7, 200, stored_dtype=stored_dtype), eye(200))
    gptq = GPTQ(4, group_size, activation_order, scale_search=False).compress(problem)
    nearest = RoundToNearest(4, group_size).compress(problem)
    assert torch.equal(gptq.weight_OI, nearest.weight_OI)
    assert gptq.grid is not None
    assert nearest.grid is not None
    assert torch.equal(gptq.grid.ints_OI, nearest.grid.ints_OI)
    assert torch.equal(gptq.grid.scale_OG, nearest.grid.scale_OG)


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
@pytest.mark.parametrize(
    ("method", "settings"), [(SparseGPT, {"sparsity": 0.5}), (SparseGPT, {"sparsity": "2:4"}), (GPTQ, {"bits": 3})]
)
def test_the_error_identities(method: type, settings: dict[str, Any], damping: float) -> None:
    """D = W - V = E U, where E_j is the scaled error of column j when it was fixed; so tr(D (H + λI) Dᵀ) = |E|²."""
    problem = layer(6, 160, seed=21)
    if method is GPTQ:
        settings = {**settings, "group_size": 32}
    weight_OI = method(**settings, damping=damping).compress(problem).weight_OI
    upper_II = factor(problem.hessian_II, damping).upper_II
    difference_OI = problem.weight_OI - weight_OI
    error_OI = torch.linalg.solve_triangular(upper_II, difference_OI, upper=True, left=False)
    _check_errors_column_by_column(problem.weight_OI, weight_OI, error_OI, upper_II)
    damped_II = problem.hessian_II + damping * problem.hessian_II.diagonal().mean() * eye(160)
    damped_loss = torch.einsum("oi,ij,oj->", difference_OI, damped_II, difference_OI)
    assert float(error_OI.square().sum()) == pytest.approx(float(damped_loss), rel=1e-9)


def _check_errors_column_by_column(
    original_OI: torch.Tensor, weight_OI: torch.Tensor, error_OI: torch.Tensor, upper_II: torch.Tensor
) -> None:
    """D = E U holds for any D; check that E_j U_jj is the error at the time when column j was fixed."""
    for j in range(original_OI.shape[1]):
        updated_O = original_OI[:, j] - error_OI[:, :j] @ upper_II[:j, j]
        torch.testing.assert_close(updated_O - weight_OI[:, j], error_OI[:, j] * upper_II[j, j], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4"])
def test_repairing_beats_masking_on_correlated_inputs(sparsity: float | str) -> None:
    """An expectation on seeded cases, not a theorem."""
    for seed in range(5):
        problem = layer(32, 160, seed=seed)
        chosen = Sparsity.parse(sparsity)
        losses = [method(chosen).compress(problem).loss for method in (SparseGPT, Wanda, Magnitude)]
        assert losses == sorted(losses)


def test_feeding_back_errors_beats_rounding_on_correlated_inputs() -> None:
    """An expectation on seeded cases, not a theorem."""
    for seed in range(5):
        problem = layer(32, 160, seed=seed)
        for group_size in (32, None):
            assert GPTQ(3, group_size).compress(problem).loss < RoundToNearest(3, group_size).compress(problem).loss


@pytest.mark.parametrize("compressor", [SparseGPT(Sparsity.parse(0.5)), GPTQ(4, 32, False), GPTQ(4, 32, True)])
def test_an_indefinite_hessian_names_the_layer_and_is_never_replaced(compressor: Any) -> None:
    problem = layer()
    hessian_II = problem.hessian_II.clone()
    hessian_II[3, 90] = hessian_II[90, 3] = 2 * (hessian_II[3, 3] * hessian_II[90, 90]).sqrt()
    indefinite = with_hessian(problem, hessian_II)
    with pytest.raises(NotPositiveDefinite, match=r"blocks\.0\.linear: .*damping 0\.01.* Raise damping"):
        compressor.compress(indefinite)


def test_float32_follows_float64() -> None:
    """Masks may differ where scores are equal within roundoff; losses may not."""
    for compressor in (SparseGPT(Sparsity.parse(0.5)), SparseGPT(Sparsity.parse("2:4")), GPTQ(4, 32)):
        wide, narrow = layer(24, 288, seed=5), layer(24, 288, seed=5, dtype=torch.float32)
        wide_solution, narrow_solution = compressor.compress(wide), compressor.compress(narrow)
        same = (wide_solution.weight_OI - narrow_solution.weight_OI.double()).abs() < 1e-3
        assert same.double().mean() > 0.97
        assert narrow_solution.loss == pytest.approx(wide_solution.loss, rel=0.01)
        assert true_loss(narrow, narrow_solution) == pytest.approx(narrow_solution.loss, rel=1e-3)


def test_layers_with_different_hessians_are_not_solved_together() -> None:
    with pytest.raises(StatisticsError, match="must share a Hessian"):
        solve_many([layer(seed=1), layer(seed=2)], [SparseGPT(Sparsity.parse(0.5))])
