"""Properties of every method, setting and precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from crosscal.compressors import (
    ALPS,
    AWQ,
    COMPRESSORS,
    DATA_FREE,
    DLP,
    GBLM,
    GPTQ,
    OWL,
    QEP,
    Bias,
    Compressor,
    Descent,
    EoRA,
    Grid,
    GridOutliers,
    LayerProblem,
    LayerSolution,
    Magnitude,
    Refit,
    RoundToNearest,
    Scales,
    SparseGPT,
    SparseGPTQ,
    SparseLowRank,
    Sparsity,
    SpQR,
    Swaps,
    Wanda,
)
from crosscal.statistics import Gradient
from tests.helpers.problems import (
    DENSE,
    HALF,
    NOTHING,
    TWO_OF_FOUR,
    correlated_inputs_TI,
    label,
    layer,
    true_loss,
    with_hessian,
)

CASES: list[Compressor] = [
    *(
        method(sparsity)
        for method in (Magnitude, Wanda, GBLM, SparseGPT)
        for sparsity in (HALF, TWO_OF_FOUR, DENSE, NOTHING)
    ),
    SparseGPT(HALF, damping=0.1),
    *(RoundToNearest(bits, group) for bits, group in ((2, 32), (4, None), (8, 160))),
    *(GPTQ(bits, group, order) for bits, group in ((2, 32), (4, None), (8, 160)) for order in (False, True)),
    *(SparseGPTQ(sparsity, 4, 32) for sparsity in (HALF, TWO_OF_FOUR, DENSE, NOTHING)),
    *(SpQR(bits, group, threshold=most) for bits, group, most in ((3, 16, 0.2), (2, 32, 0.05), (8, 160, 100.0))),
    *(ALPS(sparsity, iterations=40) for sparsity in (HALF, TWO_OF_FOUR, DENSE, NOTHING)),
    *(SparseLowRank(sparsity, 4, iterations=30) for sparsity in (HALF, TWO_OF_FOUR, DENSE)),
    *(AWQ(bits, group) for bits, group in ((2, 32), (4, None))),
    *(
        Refit(),
        Refit(None),
        Swaps(),
        Scales(),
        Descent(),
        EoRA(4),
        EoRA(0),
        OWL(),
        DLP(),
        Bias(),
        QEP(),
        QEP(1.0, 0.01),
    ),
]
LOSS_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}  # float32: D H Dᵀ cancels up to the condition number


def test_every_method_is_tried() -> None:
    assert {type(case) for case in CASES} == set(COMPRESSORS.values())
    assert {COMPRESSORS[name] for name in DATA_FREE} == {Magnitude, RoundToNearest}
    assert all(dataclasses.is_dataclass(method) and method.version >= 1 for method in COMPRESSORS.values())


def bits_of(problem: LayerProblem) -> list[torch.Tensor]:
    return [problem.weight_OI.clone(), problem.hessian_II.clone()]


@pytest.mark.parametrize("stored_dtype", [None, torch.bfloat16], ids=label)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=label)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_compress_is_pure_deterministic_and_reports_true_loss(
    case: Compressor, dtype: torch.dtype, stored_dtype: torch.dtype | None
) -> None:
    problem = layer(dtype=dtype, stored_dtype=stored_dtype)
    before = bits_of(problem)
    solution, again = case.compress(problem), case.compress(problem)
    assert all(torch.equal(a, b) for a, b in zip(before, bits_of(problem), strict=True))
    assert torch.equal(solution.weight_OI, again.weight_OI)
    assert solution.loss == again.loss
    assert solution.weight_OI.dtype == dtype
    assert solution.weight_OI.shape == problem.weight_OI.shape
    if stored_dtype is not None:
        assert torch.equal(solution.base.weight_OI, solution.base.weight_OI.to(stored_dtype).to(dtype))
    energy = torch.einsum("oi,ij,oj->", *(t.double() for t in (before[0], before[1], before[0]))).item()
    assert solution.loss == pytest.approx(true_loss(problem, solution), rel=LOSS_TOLERANCE[dtype])
    assert solution.relative_loss == pytest.approx(true_loss(problem, solution) / energy, rel=LOSS_TOLERANCE[dtype])
    assert solution.damping in (getattr(case, "damping", None), None)
    _check_zeros(case, problem, solution)


def _check_zeros(case: Any, problem: LayerProblem, solution: LayerSolution) -> None:
    sparsity = getattr(case, "sparsity", None)
    zeros = int((solution.base.weight_OI == 0).sum())
    if case.kind == "prune":
        assert zeros == sparsity.fraction * solution.weight_OI.numel()
        assert solution.grid is None
    elif case.kind == "quantize":
        assert sparsity is None or zeros >= sparsity.fraction * solution.weight_OI.numel()
        assert isinstance(solution.base, GridOutliers if isinstance(case, SpQR) else Grid)
    changes_nothing = case.kind in ("refine", "allocate", "transform") or case == EoRA(0)
    if (case.kind == "prune" and sparsity == DENSE) or changes_nothing:
        assert torch.equal(solution.weight_OI, problem.weight_OI)
        assert solution.loss == solution.relative_loss == 0.0
    if sparsity == NOTHING:
        assert not solution.weight_OI.any()
        assert solution.relative_loss == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "prune"], ids=label)
def test_negated_weights_give_the_negated_solution(case: Compressor) -> None:
    problem = layer()
    negated = dataclasses.replace(problem, weight_OI=-problem.weight_OI)
    torch.testing.assert_close(case.compress(negated).weight_OI, -case.compress(problem).weight_OI)


@pytest.mark.parametrize("case", [c for c in CASES if type(c) in (Magnitude, Wanda, GBLM)], ids=label)
def test_masks_keep_the_survivors_as_they_were(case: Compressor) -> None:
    problem = layer()
    weight_OI = case.compress(problem).weight_OI
    assert torch.equal(weight_OI[weight_OI != 0], problem.weight_OI[weight_OI != 0])


@pytest.mark.parametrize("case", [c for c in CASES if type(c) in (Magnitude, RoundToNearest)], ids=label)
def test_methods_without_data_ignore_the_hessian(case: Compressor) -> None:
    problem = layer()
    other = with_hessian(problem, torch.eye(160, dtype=torch.float64))
    assert torch.equal(case.compress(problem).weight_OI, case.compress(other).weight_OI)


def test_wanda_is_weight_times_input_norm() -> None:
    problem = layer(5, 12)
    score_OI = problem.weight_OI.abs() * problem.hessian_II.diagonal().sqrt()
    weight_OI = Wanda(Sparsity.parse(0.25)).compress(problem).weight_OI
    for row, scores in zip(weight_OI.tolist(), score_OI.tolist(), strict=True):
        removed = sorted(range(12), key=scores.__getitem__)[:3]
        assert [i for i, weight in enumerate(row) if weight == 0] == sorted(removed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=label)
@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR, Sparsity.parse(0.7)], ids=label)
def test_gblm_without_gradients_is_wanda(sparsity: Sparsity, dtype: torch.dtype) -> None:
    problem = layer(dtype=dtype)
    without = GBLM(sparsity, gradient_weight=0).compress(problem).weight_OI
    assert torch.equal(without, Wanda(sparsity).compress(problem).weight_OI)
    assert not torch.equal(without, GBLM(sparsity).compress(problem).weight_OI)


def test_gblm_is_weight_times_both_norms() -> None:
    problem = layer(5, 12)
    norm_I, gradient_OI = problem.hessian_II.diagonal().sqrt(), problem.further[Gradient.SQUARE].sqrt()
    score_OI = problem.weight_OI.abs() * (norm_I + 7.0 * gradient_OI)
    weight_OI = GBLM(Sparsity.parse(0.25), gradient_weight=7.0).compress(problem).weight_OI
    for row, scores in zip(weight_OI.tolist(), score_OI.tolist(), strict=True):
        removed = sorted(range(12), key=scores.__getitem__)[:3]
        assert [i for i, weight in enumerate(row) if weight == 0] == sorted(removed)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_dead_inputs_do_not_affect_live_weights(case: Compressor) -> None:
    """Layers that differ only in the weights of dead inputs get the same live weights and loss. Quantizers run with
    groups of one input: in a larger group the dead weights change the common scale."""
    if getattr(case, "sparsity", DENSE) not in (DENSE, NOTHING):
        return  # pruning divides its budget between live and dead inputs: see test_compressors_sparsity
    if getattr(case, "bits", None):
        case = dataclasses.replace(case, group_size=1)  # pyright: ignore[reportArgumentType]
    dead = [3, 40, 41, 159]
    problem = layer(dead=dead)
    other_OI = problem.weight_OI.clone()
    other_OI[:, dead] *= -7
    other = dataclasses.replace(problem, weight_OI=other_OI)
    alive_I = problem.hessian_II.diagonal() != 0
    assert int((~alive_I).sum()) == len(dead)
    solutions = case.compress(problem), case.compress(other)
    torch.testing.assert_close(solutions[0].weight_OI[:, alive_I], solutions[1].weight_OI[:, alive_I], rtol=0, atol=0)
    assert solutions[0].loss == pytest.approx(solutions[1].loss, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=label)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_layer_of_zeros_stays_zero(case: Compressor, dtype: torch.dtype) -> None:
    problem = layer(dtype=dtype)
    solution = case.compress(dataclasses.replace(problem, weight_OI=torch.zeros_like(problem.weight_OI)))
    assert not solution.weight_OI.any()
    assert solution.loss == solution.relative_loss == 0.0


def test_a_shared_factor_is_used_where_its_damping_fits() -> None:
    problem = layer()
    shared = dataclasses.replace(problem, shared_factor=problem.factor(0.01))
    assert shared.factor(0.01) is shared.shared_factor
    assert shared.factor(0.02) is not shared.shared_factor
    for compressor in (SparseGPT(HALF), SparseGPT(HALF, damping=0.02), GPTQ(4, 32, True)):
        assert torch.equal(compressor.compress(shared).weight_OI, compressor.compress(problem).weight_OI)


@pytest.mark.parametrize("damping", [1e-3, 0.01, 30.0])
@pytest.mark.parametrize("tokens", [20, 160, 2000])
@pytest.mark.parametrize(
    ("method", "settings"), [(SparseGPT, {"sparsity": 0.5}), (GPTQ, {"bits": 8, "group_size": 32})]
)
def test_a_loss_in_float32_is_the_true_one(method: type, settings: dict[str, Any], tokens: int, damping: float) -> None:
    """Also if the Hessian is singular, inputs are dead, or damping causes most of the error."""
    input_TI = correlated_inputs_TI(tokens, 160, seed=tokens, dead=[3, 77])
    weight_OI = torch.randn(32, 160, generator=torch.Generator().manual_seed(1))
    problem = LayerProblem("layer", weight_OI, (input_TI.mT @ input_TI / tokens).float())
    solution = method(**settings, damping=damping).compress(problem)
    assert solution.loss == pytest.approx(true_loss(problem, solution), rel=1.5e-5)
