"""AWQ: scales equal a slow reference and change no output; reported losses are the true ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosscal.compressors import (
    AWQ,
    GPTQ,
    LayerProblem,
    LayerSolution,
    Refit,
    RoundToNearest,
    Site,
    SparseGPT,
    Statistic,
    Wanda,
    run,
)
from crosscal.compressors.recipe import site_of, solutions
from crosscal.errors import UsageError
from tests.helpers.problems import correlated_inputs_TI, reference_grid, true_loss

ANY = torch.clone
"""A `storable_I` that can store any scale."""


def outliers_TI(tokens: int = 400, inputs: int = 64) -> Tensor:
    """Inputs of which a few are many times as large as the others, as in language models."""
    input_TI = correlated_inputs_TI(tokens, inputs, seed=7)
    input_TI[:, [3, 17, 40]] *= torch.tensor([20.0, 40.0, 10.0], dtype=torch.float64)
    return input_TI


def problems_of(input_TI: Tensor, outputs: tuple[int, ...] = (24, 40)) -> list[LayerProblem]:
    generator = torch.Generator().manual_seed(3)
    gram_II = input_TI.mT @ input_TI / len(input_TI)
    further = {Statistic.ABS_SUM: input_TI.abs().mean(0), Statistic.SUM: input_TI.mean(0)}
    weights = [torch.randn(o, input_TI.shape[1], generator=generator, dtype=torch.float64) for o in outputs]
    return [LayerProblem(f"layer{k}", weight_OI, gram_II, further) for k, weight_OI in enumerate(weights)]


def answers(problems: list[LayerProblem], *steps: object) -> list[LayerSolution]:
    return solutions(problems, run(site_of(problems, storable_I=ANY), steps))


def total(answer: list[LayerSolution]) -> float:
    return sum(each.loss for each in answer)


def reference_scale_I(problems: list[LayerProblem], input_TI: Tensor, bits: int, group: int, points: int) -> Tensor:
    """Choose the best scale by running the rounded layers on the tokens themselves."""
    best_I, least = None, float("inf")
    for k in range(points):
        scale_I = input_TI.abs().mean(0) ** (k / points)
        scale_I = scale_I.clamp(min=1e-4)
        scale_I /= (scale_I.max() * scale_I.min()).sqrt()
        error = 0.0
        for problem in problems:
            scaled_OI = problem.weight_OI * scale_I
            rounded_OI = torch.zeros_like(scaled_OI)
            for first in range(0, scaled_OI.shape[1], group):
                part = slice(first, first + group)
                grid_O1 = reference_grid(scaled_OI[:, part], bits)[:, None]
                levels = (scaled_OI[:, part] / grid_O1).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                rounded_OI[:, part] = levels * grid_O1
            output_TO = (input_TI / scale_I) @ rounded_OI.mT - input_TI @ problem.weight_OI.mT
            error += float(output_TO.square().sum() / len(input_TI))
        if error < least:
            best_I, least = scale_I, error
    assert best_I is not None
    return best_I


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 16), (4, 64)])
def test_the_scales_are_those_of_the_reference(bits: int, group: int) -> None:
    input_TI = outliers_TI()
    problems = problems_of(input_TI)
    site = run(site_of(problems, storable_I=ANY), [AWQ(bits, group)])
    assert site.scale_I is not None
    torch.testing.assert_close(site.scale_I, reference_scale_I(problems, input_TI, bits, group, 20))
    assert float(site.scale_I.max() / site.scale_I.min()) > 1.5  # so the exponent chosen is not 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_behind_it_costs_no_more_than_rounding_alone(bits: int) -> None:
    """The exponent 0 is one of the candidates; with outlier inputs the loss falls by at least 10 %."""
    problems = problems_of(outliers_TI())
    alone = total(answers(problems, RoundToNearest(bits, 32)))
    assert total(answers(problems, AWQ(bits, 32, points=1), RoundToNearest(bits, 32))) == pytest.approx(alone)
    assert total(answers(problems, AWQ(bits, 32), RoundToNearest(bits, 32))) < 0.9 * alone


RECIPES = [
    (AWQ(3, 32),),
    (AWQ(3, 32), RoundToNearest(3, 32)),
    (AWQ(3, 32), GPTQ(3, 32)),
    (AWQ(3, 32), SparseGPT(0.5), Refit()),  # pyright: ignore[reportArgumentType]
    (Wanda(0.5), AWQ(4, None), Refit(), GPTQ(4, 32)),  # pyright: ignore[reportArgumentType]
    (AWQ(2, 16), AWQ(4, 64), RoundToNearest(4, 64)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda steps: "+".join(type(step).__name__ for step in steps))
def test_losses_are_those_of_the_matrices_on_the_divided_inputs(recipe: tuple[object, ...]) -> None:
    input_TI = outliers_TI()
    problems = problems_of(input_TI)
    for problem, answer in zip(problems, answers(problems, *recipe), strict=True):
        assert answer.scale_I is not None
        difference_TO = (input_TI / answer.scale_I) @ answer.stored_weight_OI.mT - input_TI @ problem.weight_OI.mT
        error = float(difference_TO.square().sum() / len(input_TI))
        energy = float((input_TI @ problem.weight_OI.mT).square().sum() / len(input_TI))
        assert answer.loss == pytest.approx(error, rel=1e-9, abs=1e-20 * energy)
        assert answer.loss == pytest.approx(true_loss(problem, answer), rel=1e-9, abs=1e-20 * energy)
        assert answer.relative_loss == pytest.approx(error / energy, rel=1e-9, abs=1e-20)
        pruned = sum(isinstance(step, SparseGPT | Wanda) for step in recipe)
        assert (answer.sparsity >= 0.5) == bool(pruned)


def test_scales_alone_change_nothing() -> None:
    problems = problems_of(outliers_TI())
    for problem, answer in zip(problems, answers(problems, AWQ(3, 32)), strict=True):
        torch.testing.assert_close(answer.weight_OI, problem.weight_OI, rtol=1e-14, atol=0)
        assert not torch.equal(answer.stored_weight_OI, problem.weight_OI)


def test_statistics_move_as_recomputation_would() -> None:
    input_TI = outliers_TI()
    site = run(site_of(problems_of(input_TI), storable_I=ANY), [AWQ(3, 32), AWQ(2, 64)])
    assert site.scale_I is not None
    fresh = problems_of(input_TI / site.scale_I)[0]
    means = {Statistic.GRAM: fresh.hessian_II, Statistic.SQUARE_SUM: fresh.hessian_II.diagonal(), **fresh.further}
    for statistic, mean in means.items():
        torch.testing.assert_close(site.statistics[statistic], mean)


def test_a_step_behind_it_works_on_the_moved_problem() -> None:
    """GPTQ after AWQ equals GPTQ on the scaled matrices and inputs."""
    input_TI = outliers_TI()
    site = run(site_of(problems_of(input_TI), storable_I=ANY), [AWQ(3, 32)])
    done = run(site, [GPTQ(3, 32)])
    assert site.scale_I is not None
    moved_TI = input_TI / site.scale_I
    gram_II = moved_TI.mT @ moved_TI / len(moved_TI)
    for before, after in zip(site.layers, done.layers, strict=True):
        plain = GPTQ(3, 32).compress(LayerProblem("moved", before.base.weight_OI, gram_II))
        torch.testing.assert_close(after.base.weight_OI, plain.weight_OI)


def test_scales_are_those_that_can_be_stored() -> None:
    """Also after an earlier scaling step: the product of both scales is stored."""

    def powers_of_two(scale_I: Tensor) -> Tensor:
        return scale_I.log2().round().exp2()

    problems = problems_of(outliers_TI())
    for steps in ([AWQ(3, 32)], [AWQ(3, 32), AWQ(2, 16)]):
        scale_I = run(site_of(problems, storable_I=powers_of_two), steps).scale_I
        assert scale_I is not None
        assert torch.equal(scale_I, powers_of_two(scale_I))
        assert len(scale_I.unique()) > 1


def test_where_nothing_absorbs_scales_there_are_none() -> None:
    site: Site = site_of(problems_of(outliers_TI()))
    assert run(site, [AWQ(3, 32)]).scale_I is None
    plain, behind = (run(site, [*steps, RoundToNearest(3, 32)]) for steps in ([], [AWQ(3, 32)]))
    for a, b in zip(plain.layers, behind.layers, strict=True):
        assert torch.equal(a.weight_OI, b.weight_OI)


def test_what_is_rounded_is_scaled_no_more() -> None:
    with pytest.raises(UsageError, match=r"layer0: .*Scale first"):
        run(site_of(problems_of(outliers_TI()), storable_I=ANY), [RoundToNearest(3, 32), AWQ(3, 32)])
