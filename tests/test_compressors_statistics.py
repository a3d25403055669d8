"""Statistics that steps receive: only those that they declare, of their own mixture, and scaled as the inputs are.

Shapes: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from crosscal.compressors import (
    COMPRESSORS,
    EoRA,
    Placed,
    RoundToNearest,
    Site,
    SparseGPT,
    Statistic,
    Statistics,
    run,
    solve,
)
from crosscal.compressors.recipe import site_of
from crosscal.compressors.sparsity import pruned
from crosscal.errors import StatisticsError
from crosscal.statistics import Gradient
from tests.helpers.problems import layer


def test_a_step_sees_what_it_declared_and_nothing_else() -> None:
    @dataclass(frozen=True)
    class Liar:
        kind: ClassVar = "refine"
        needs: ClassVar = frozenset({Statistic.SQUARE_SUM})
        version: ClassVar = 1

        def __call__(self, site: Site) -> Site:
            assert site.statistics.square_I.shape == (8,)
            return site if site.statistics.hessian_II.any() else site.each(lambda layer: layer)

    @dataclass(frozen=True)
    class Curious(Liar):
        def __call__(self, site: Site) -> Site:
            return site.each(lambda each: pruned(each, site.statistics.grad_square_OI(each.name) > 0))

    for step in (Liar(), Curious()):
        with pytest.raises(StatisticsError, match="does not declare"):
            run(site_of([layer(4, 8)]), [step])


@pytest.mark.parametrize("name", COMPRESSORS)
def test_undeclared_statistics_do_not_matter(name: str) -> None:
    """Statistics that a step does not declare are replaced by NaN."""
    settings = {"sparsity": 0.5} if "sparsity" in COMPRESSORS[name].__dataclass_fields__ else {}
    settings |= {"bits": 4, "group_size": 32} if "bits" in COMPRESSORS[name].__dataclass_fields__ else {}
    step, problem = COMPRESSORS[name](**settings), layer(6, 64)
    site = site_of([problem])
    start = run(site, [SparseGPT(0.5)] if step.kind == "refine" else [])
    true = {Statistic.GRAM: problem.hessian_II, Statistic.SQUARE_SUM: problem.hessian_II.diagonal(), **problem.further}
    means = {key: mean if key in step.needs else torch.full_like(mean, torch.nan) for key, mean in true.items()}
    gradients = [{problem.name: every.pop(Gradient.SQUARE)} for every in (true, means)]
    clean, poisoned = (
        Site(site.name, start.layers, Statistics(every, grad_squares=squares), storable_I=torch.clone)
        for every, squares in zip((true, means), gradients, strict=True)
    )
    a, b = run(poisoned, [step]).layers[0].weight_OI, run(clean, [step]).layers[0].weight_OI
    assert torch.equal(a, b)
    assert b.isfinite().all()


def test_statistics_of_scaled_inputs_are_those_of_the_scaled_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    input_TI, dense_TI = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64)
    scale_I = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5

    def of(x_TI: Tensor, d_TI: Tensor) -> Statistics:
        gram_II, drift_II = (each_TI.mT @ each_TI / len(x_TI) for each_TI in (x_TI, d_TI - x_TI))
        means = {Statistic.GRAM: gram_II, Statistic.SQUARE_SUM: gram_II.diagonal(), Statistic.DRIFT: drift_II}
        means |= {Statistic.ABS_SUM: x_TI.abs().mean(0), Statistic.SUM: x_TI.mean(0)}
        return Statistics(means | {Statistic.CROSS: d_TI.mT @ x_TI / len(x_TI)})

    moved, again = of(input_TI, dense_TI).scaled(scale_I), of(input_TI / scale_I, dense_TI / scale_I)
    for statistic in Statistic:
        torch.testing.assert_close(moved[statistic], again[statistic])


def test_gradients_of_scaled_weights_are_those_of_the_scaled_layer() -> None:
    """Reference: autograd, per window, of the loss as a function of W · s with inputs x / s."""
    generator = torch.Generator().manual_seed(0)
    inputs_BTI, back_BTO = (torch.randn(3, 5, n, generator=generator, dtype=torch.float64) for n in (8, 4))
    weight_OI = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    scale_I = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5

    def squared(scale_I: Tensor) -> Tensor:
        total = torch.zeros(4, 8, dtype=torch.float64)
        for input_TI, back_TO in zip(inputs_BTI, back_BTO, strict=True):
            scaled_OI = (weight_OI * scale_I).requires_grad_()
            loss = (torch.tanh(input_TI / scale_I @ scaled_OI.mT) * back_TO).sum()
            total += torch.autograd.grad(loss, scaled_OI)[0] ** 2
        return total / 3

    statistics = Statistics({}, grad_squares={"layer": squared(torch.ones(8))})
    torch.testing.assert_close(statistics.scaled(scale_I).grad_square_OI("layer"), squared(scale_I))


def test_a_repair_has_a_mixture_of_its_own() -> None:
    """RTN on the general mixture with an EoRA step on the domain's equals running both steps by hand."""
    general, domain = layer(8, 48, seed=1), layer(8, 48, seed=2)
    means = {"domain": Statistics({Statistic.GRAM: domain.hessian_II})}
    [site] = solve(site_of([general]), [(Placed(RoundToNearest(3, 16)), Placed(EoRA(2), "domain"))], means.__getitem__)
    rounded = run(site_of([general]), [RoundToNearest(3, 16)])
    by_hand = run(Site("x", rounded.layers, means["domain"]), [EoRA(2)])
    assert torch.equal(site.layers[0].weight_OI, by_hand.layers[0].weight_OI)
