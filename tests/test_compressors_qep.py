"""QEP against computations on the inputs themselves: least squares, no correction for equal streams, true losses.

Shapes: T tokens, O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from crosscal.compressors import GPTQ, QEP, EoRA, LayerProblem, Refit, RoundToNearest, SparseGPT, Statistic, run
from crosscal.compressors.problem import solved
from crosscal.compressors.recipe import check_order, site_of
from crosscal.errors import UsageError
from tests.helpers.problems import correlated_inputs_TI

INPUTS, OUTPUTS, TOKENS = 24, 9, 200
ROUNDOFF_F64 = 1e-9


def streams_TI(dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Inputs x of the dense model, and y after compressed blocks: x with a linear and a random error."""
    x_TI = correlated_inputs_TI(TOKENS, INPUTS, seed=1)
    generator = torch.Generator().manual_seed(2)
    mix_II = torch.eye(INPUTS) + 0.1 * torch.randn(INPUTS, INPUTS, generator=generator)
    y_TI = x_TI @ mix_II.double() + 0.2 * torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.float64)
    y_TI[:, list(dead)] = 0.0
    return x_TI, y_TI


def problem_of(x_TI: Tensor, y_TI: Tensor, dtype: torch.dtype = torch.float64) -> LayerProblem:
    weight_OI = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hessian_II, cross_II = y_TI.mT @ y_TI / len(y_TI), x_TI.mT @ y_TI / len(y_TI)
    drift_II = (x_TI - y_TI).mT @ (x_TI - y_TI) / len(y_TI)
    further = {Statistic.CROSS: cross_II.to(dtype), Statistic.DRIFT: drift_II.to(dtype)}
    return LayerProblem("layer", weight_OI.to(dtype), hessian_II.to(dtype), further)


def test_all_of_it_undamped_is_least_squares_on_the_inputs() -> None:
    x_TI, y_TI = streams_TI()
    problem = problem_of(x_TI, y_TI)
    expected_IO = torch.linalg.lstsq(y_TI, x_TI @ problem.weight_OI.mT).solution
    found_OI = QEP(propagation=1.0, damping=0.0).compress(problem).weight_OI
    torch.testing.assert_close(found_OI, expected_IO.mT, rtol=0, atol=ROUNDOFF_F64)


@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("propagation", [0.0, 0.25, 1.0])
def test_it_is_ridge_regression_of_the_error_in_part(propagation: float, damping: float) -> None:
    """The change is p · argmin_Δ E‖W (x - y) - Δ y‖² + λ‖Δ‖² (reference: √λ I stacked under y), 0 for dead inputs."""
    x_TI, y_TI = streams_TI(dead=(3, 20))
    problem = problem_of(x_TI, y_TI)
    ridge = (damping * y_TI.square().sum(0).mean()).sqrt()
    rows_TI = torch.cat([y_TI, ridge * torch.eye(INPUTS, dtype=torch.float64)])
    error_TO = torch.cat([(x_TI - y_TI) @ problem.weight_OI.mT, torch.zeros(INPUTS, OUTPUTS, dtype=torch.float64)])
    expected_OI = problem.weight_OI + propagation * torch.linalg.lstsq(rows_TI, error_TO).solution.mT
    solution = QEP(propagation, damping).compress(problem)
    torch.testing.assert_close(solution.weight_OI, expected_OI, rtol=0, atol=ROUNDOFF_F64)
    assert torch.equal(solution.weight_OI[:, [3, 20]], problem.weight_OI[:, [3, 20]])


def test_the_more_is_corrected_the_smaller_the_error_of_outputs() -> None:
    problem = problem_of(*streams_TI())
    losses = [QEP(p, 0.0).compress(problem).relative_loss for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_where_both_streams_are_one_nothing_is_corrected() -> None:
    x_TI, _ = streams_TI()
    problem = problem_of(x_TI, x_TI)
    for step in (QEP(), QEP(1.0, 0.0)):
        solution = step.compress(problem)
        assert torch.equal(solution.weight_OI, problem.weight_OI)
        assert solution.loss == 0.0
        alone, behind = (run(site_of([problem]), steps).layers[0] for steps in ([GPTQ(3, 8)], [step, GPTQ(3, 8)]))
        assert torch.equal(alone.weight_OI, behind.weight_OI)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("step", [GPTQ(2, 8), GPTQ(4, None), SparseGPT(0.5)])
@pytest.mark.parametrize("corrected", [False, True])
def test_losses_are_those_of_the_dense_outputs(step: object, corrected: bool, dtype: torch.dtype) -> None:
    """Relative loss = E‖W x - V y‖² / E‖W x‖² over the tokens themselves, with and without correction."""
    x_TI, y_TI = streams_TI()
    problem = problem_of(x_TI, y_TI, dtype)
    site = run(site_of([problem]), [QEP(), step] if corrected else [step])
    solution = solved(problem, site.layers[0])
    wanted_TO = x_TI @ problem.weight_OI.double().mT
    loss = float((wanted_TO - y_TI @ solution.weight_OI.double().mT).square().sum()) / TOKENS
    assert solution.loss == pytest.approx(loss, rel=1e-9 if dtype == torch.float64 else 1e-4)
    relative = loss / (float(wanted_TO.square().sum()) / TOKENS)
    assert solution.relative_loss == pytest.approx(relative, rel=1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("steps", [[GPTQ(3, 8)], [SparseGPT(0.5), Refit()], [RoundToNearest(3, 8), EoRA(2)]])
def test_later_steps_work_on_the_corrected_matrix_as_on_any_other(steps: list[object]) -> None:
    problem = problem_of(*streams_TI())
    corrected = dataclasses.replace(problem, weight_OI=QEP().compress(problem).weight_OI)
    behind, alone = run(site_of([problem]), [QEP(), *steps]).layers[0], run(site_of([corrected]), steps).layers[0]
    assert torch.equal(behind.weight_OI, alone.weight_OI)
    assert not torch.equal(corrected.weight_OI, problem.weight_OI)


@pytest.mark.parametrize(
    "steps", [[QEP()], [GPTQ(4, 8), QEP()], [QEP(), QEP(), GPTQ(4, 8)], [SparseGPT(0.5), QEP(), GPTQ(4, 8)]]
)
def test_qep_must_precede_pruning_and_rounding(steps: list[object]) -> None:
    with pytest.raises(UsageError, match="before it is pruned or rounded"):
        check_order([(type(step).__name__.lower(), step) for step in steps])


@pytest.mark.parametrize("before", [GPTQ(4, 8), SparseGPT(0.5)])
def test_what_is_compressed_already_is_not_corrected(before: object) -> None:
    site = run(site_of([problem_of(*streams_TI())]), [before])
    with pytest.raises(UsageError, match="Correct first"):
        run(site, [QEP()])


@pytest.mark.parametrize("settings", [{"propagation": -0.1}, {"propagation": 1.5}, {"damping": -1.0}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        dataclasses.replace(QEP(), **settings)
