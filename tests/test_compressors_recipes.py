"""Recipes: properties of sequences of steps, and each refinement against a plain float64 reference.

Shapes: O outputs, I inputs, K rank, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from crosscal.compressors import (
    ALPS,
    COMPRESSORS,
    GPTQ,
    QEP,
    Bias,
    Descent,
    EoRA,
    Grid,
    Magnitude,
    Placed,
    Refit,
    RoundToNearest,
    Scales,
    Site,
    SparseGPT,
    SparseGPTQ,
    SparseLowRank,
    SpQR,
    Statistic,
    Statistics,
    Swaps,
    Wanda,
    run,
    solve,
)
from crosscal.compressors.problem import solved
from crosscal.compressors.recipe import check_inputs, check_order, site_of
from crosscal.compressors.sparsity import pruned
from crosscal.errors import NotPositiveDefinite, StatisticsError, UsageError
from crosscal.statistics import Gradient
from tests.helpers.problems import layer, true_loss

PRUNERS = [Magnitude(0.6), Wanda(0.6), SparseGPT(0.6), SparseGPT("2:4"), ALPS(0.6, iterations=30)]
ROUNDERS = [RoundToNearest(3, 32), GPTQ(3, 32), GPTQ(2, None), SparseGPTQ(0.4, 3, 32)]
PRUNED_AGAIN = [SparseGPT(0.8), SparseGPT("2:4"), SparseGPTQ("2:4", 4, 32), ALPS(0.8, iterations=20)]
REFINEMENTS = [Refit(), Refit(1), Refit(None), Swaps(20), Swaps(20, group=4), Scales(), Descent()]


def loss_after(problem: Any, steps: Sequence[Any]) -> float:
    return true_loss(problem, solved(problem, run(site_of([problem]), steps).layers[0]))


@pytest.mark.parametrize("start", [*PRUNERS, *ROUNDERS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_refinement_and_repair_never_raise_the_loss(start: Any, dtype: torch.dtype) -> None:
    problem = layer(20, 160, dtype=dtype, dead=[3, 44])
    before = loss_after(problem, [start])
    for refinement in (*REFINEMENTS, EoRA(3)):
        if isinstance(refinement, Swaps) and (refinement.group is None) == (getattr(start, "sparsity", None) == "2:4"):
            continue
        assert loss_after(problem, [start, refinement]) <= before * (1 + 1e-6), refinement


@pytest.mark.parametrize("start", PRUNERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("later", [*ROUNDERS, *REFINEMENTS, EoRA(3), *PRUNED_AGAIN], ids=str)
def test_what_was_pruned_stays_pruned(start: Any, later: Any, dtype: torch.dtype) -> None:
    """Except by `Swaps`, which may choose another mask with the same number per row."""
    problem = layer(20, 160, dtype=dtype)
    first = run(site_of([problem]), [start]).layers[0]
    then = run(site_of([problem]), [start, later]).layers[0]
    assert first.keep_OI is not None
    assert then.keep_OI is not None
    assert not then.base.weight_OI[~then.keep_OI].any()
    if isinstance(later, Swaps):
        assert torch.equal(then.keep_OI.sum(1), first.keep_OI.sum(1))
    else:
        assert not (then.keep_OI & ~first.keep_OI).any()


def test_pruning_again_removes_what_the_second_step_says() -> None:
    problem = layer(20, 160)
    for later in (Magnitude(0.7), Wanda(0.7), SparseGPT(0.7), ALPS(0.7, iterations=20)):
        done = run(site_of([problem]), [SparseGPT(0.4), later]).layers[0]
        assert int((done.base.weight_OI == 0).sum()) == round(0.7 * 20 * 160), later


@pytest.mark.parametrize("first", [0.5, 0.7], ids=str)
@pytest.mark.parametrize("later", [SparseGPT(0.5), SparseGPT(0.7), SparseGPTQ(0.6, 8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_columns_pruned_again_lose_only_what_the_larger_sparsity_says(
    first: float, later: Any, dtype: torch.dtype
) -> None:
    """Also where the first step took more from some blocks of columns than from others, and from dead inputs."""
    problem = layer(20, 400, dtype=dtype, dead=[3, 44, 390])
    done = run(site_of([problem]), [Magnitude(first), later]).layers[0]
    assert done.keep_OI is not None
    assert int((~done.keep_OI).sum()) == round(max(first, later.sparsity.fraction) * 20 * 400)


def test_a_pattern_behind_a_pattern_removes_nothing_more() -> None:
    """Nor weights of dead inputs, which cost as little as those that are gone."""
    problem = layer(20, 160, dead=[4, 44])
    mask, again = Magnitude("2:4"), SparseGPT("2:4")
    first, then = (run(site_of([problem]), steps).layers[0] for steps in ([mask], [mask, again]))
    assert first.keep_OI is not None
    assert then.keep_OI is not None
    assert torch.equal(then.keep_OI, first.keep_OI)


def test_what_was_rounded_to_zero_was_not_pruned() -> None:
    """So `Descent` may give it another level: `SparseGPTQ` marks as many weights as it says, whatever rounds to 0."""
    problem = layer(20, 160)
    for sparsity, lost in ((0.0, 0), (0.5, 1600), ("2:4", 1600)):
        done = run(site_of([problem]), [SparseGPTQ(sparsity, 2, 32)]).layers[0]
        assert done.keep_OI is not None
        assert int((~done.keep_OI).sum()) == lost
        assert int((done.base.weight_OI == 0).sum()) > lost


@pytest.mark.parametrize("scale_search", [False, True])
def test_scales_are_not_fitted_to_pruned_weights(scale_search: bool) -> None:
    """A group without a weight left has scale 1, whatever errors it was to compensate."""
    rounder = GPTQ(4, 4, activation_order=False, scale_search=scale_search)
    done = run(site_of([layer(20, 160)]), [Wanda(0.9), rounder]).layers[0]
    assert isinstance(done.base, Grid)
    assert done.keep_OI is not None
    empty_OG = ~done.keep_OI.unflatten(1, (-1, 4)).any(2)
    assert empty_OG.any()
    assert (done.base.scale_OG[empty_OG] == 1).all()


def test_a_common_beginning_gives_what_each_recipe_gives_alone() -> None:
    problems = [layer(12, 96, seed=1), layer(7, 96, seed=1)]
    problems[1] = type(problems[1])("other", problems[1].weight_OI, problems[0].hessian_II)
    recipes = [
        (SparseGPT(0.5),),
        (SparseGPT(0.5), Refit()),
        (SparseGPT(0.5), Refit(), GPTQ(4, 32)),
        (SparseGPT(0.5), Refit(), GPTQ(3, 32)),
        (SparseGPT(0.6), Refit()),
        (GPTQ(4, 32),),
        (SparseGPT(0.5), Refit(), GPTQ(4, 32), EoRA(2)),
        (SparseGPT(0.5), Refit(), GPTQ(4, 32), EoRA(4)),
        (),
    ]
    together = solve(site_of(problems), [tuple(Placed(step) for step in recipe) for recipe in recipes])
    for recipe, site in zip(recipes, together, strict=True):
        alone = run(site_of(problems), recipe)
        for one, other in zip(site.layers, alone.layers, strict=True):
            torch.testing.assert_close(one.weight_OI, other.weight_OI, rtol=1e-9, atol=1e-9)


def test_a_common_beginning_is_solved_once() -> None:
    calls: list[str] = []

    @dataclass(frozen=True)
    class Counted:
        name: str
        kind: ClassVar = "refine"
        needs: ClassVar = frozenset({Statistic.GRAM})
        version: ClassVar = 1

        def __call__(self, site: Site) -> Site:
            calls.append(self.name)
            return site

    recipes = [("a", "b", "c"), ("a", "b", "d"), ("a", "b"), ("e", "b")]
    solve(site_of([layer(4, 8)]), [tuple(Placed(Counted(name)) for name in recipe) for recipe in recipes])
    assert sorted(calls) == sorted(["a", "b", "c", "d", "e", "b"])


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


def test_a_singular_hessian_has_no_exact_refit_without_damping() -> None:
    input_TI = torch.randn(4, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = layer(3, 24)
    problem = type(problem)("thin", problem.weight_OI, input_TI.mT @ input_TI)
    with pytest.raises(NotPositiveDefinite, match=r"thin: .*damping"):
        run(site_of([problem]), [Magnitude(0.2), Refit(None)])
    assert loss_after(problem, [Magnitude(0.2), Refit(None, damping=1e-3)]) < loss_after(problem, [Magnitude(0.2)])


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


def test_groups_of_swaps_must_divide_the_inputs() -> None:
    site = run(site_of([layer(4, 64)]), [Wanda(0.5)])
    for group in (5, 3, 128):
        with pytest.raises(UsageError, match=rf"blocks\.0\.linear: `group` must divide .*group {group}, 64 inputs"):
            check_inputs(Swaps(group=group), 64, "blocks.0.linear")
        with pytest.raises(UsageError, match="must divide"):
            run(site, [Swaps(group=group)])


def named(steps: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(next(name for name, method in COMPRESSORS.items() if type(step) is method), step) for step in steps]


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([GPTQ(4, 32), Magnitude(0.5)], "integers would be lost"),
        ([SpQR(4, 16), SparseGPT(0.5)], "integers would be lost"),
        ([GPTQ(2, 32), SparseLowRank(0.5)], "integers would be lost"),
        ([SparseGPTQ("2:4", 4, 32), Swaps(group=4)], "integers would be lost"),
        ([Wanda(0.5), GPTQ(4, 32), Scales(), Swaps()], "integers would be lost"),
        ([Wanda("2:4"), Swaps()], r"2:4 \(got no group\).*{method: swaps, group: 4}"),
        ([Wanda("2:4"), Refit(), Swaps(group=8)], r"2:4 \(got group 8\).*{method: swaps, group: 4}"),
        ([Wanda("4:8"), Swaps(group=3)], "{method: swaps, group: 8}"),
        ([Wanda(0.5), Bias(), Refit()], "Put `bias` last"),
        ([GPTQ(4, 32), Bias(), EoRA(2)], "Put `bias` last"),
    ],
    ids=str,
)
def test_orders_that_undo_an_earlier_step_are_refused(steps: Sequence[Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_order(named(steps))


@pytest.mark.parametrize(
    "steps",
    [
        [Wanda(0.5), SparseGPT(0.7), Swaps(), Refit(), GPTQ(4, 32), Scales(), Descent(), EoRA(2), Bias()],
        [Wanda("2:4"), Swaps(group=4), GPTQ(4, 32)],
        [Wanda("4:8"), Swaps(group=4), Bias()],
        [Swaps(), Wanda("2:4")],
        [SparseGPTQ(0.5, 4, 32), Descent(), Bias()],
        [GPTQ(4, 32), GPTQ(3, 32)],
    ],
    ids=str,
)
def test_orders_that_keep_what_earlier_steps_did_are_taken(steps: Sequence[Any]) -> None:
    check_order(named(steps))


@pytest.mark.parametrize("start", [*ROUNDERS, SpQR(3, 16)], ids=str)
@pytest.mark.parametrize("refinement", REFINEMENTS, ids=str)
def test_a_refinement_keeps_the_form_of_rounded_weights(start: Any, refinement: Any) -> None:
    site = run(site_of([layer(6, 64)]), [Wanda("2:4"), start])
    assert type(run(site, [refinement]).layers[0].base) is type(site.layers[0].base)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_later_step_leaves_the_state_before_it_as_it_was(outputs: int) -> None:
    site = run(site_of([layer(outputs, 64)]), [Wanda(0.5), GPTQ(3, 32)])
    before_OI = site.layers[0].weight_OI.clone()
    for refinement in REFINEMENTS:
        run(site, [refinement])
        assert torch.equal(site.layers[0].weight_OI, before_OI), refinement


@pytest.mark.parametrize(
    ("steps", "damping"),
    [
        ([Wanda(0.5), Refit(damping=0.5)], 0.5),
        ([SparseGPT(0.5), Refit(None, damping=0.5)], 0.5),
        ([SparseGPT(0.5), Refit()], 0.01),
        ([SparseGPT(0.5), Wanda(0.7), Swaps()], 0.01),
        ([QEP(damping=0.2), Wanda(0.5), RoundToNearest(4, 32)], 0.2),
        ([Wanda(0.5), Refit()], None),
    ],
    ids=str,
)
def test_the_damping_is_that_of_the_last_step_that_damped(steps: Sequence[Any], damping: float | None) -> None:
    assert run(site_of([layer(4, 64)]), steps).layers[0].damping == damping


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


def test_a_repair_has_a_mixture_of_its_own() -> None:
    """RTN on the general mixture with an EoRA step on the domain's equals running both steps by hand."""
    general, domain = layer(8, 48, seed=1), layer(8, 48, seed=2)
    means = {"domain": Statistics({Statistic.GRAM: domain.hessian_II})}
    [site] = solve(site_of([general]), [(Placed(RoundToNearest(3, 16)), Placed(EoRA(2), "domain"))], means.__getitem__)
    rounded = run(site_of([general]), [RoundToNearest(3, 16)])
    by_hand = run(Site("x", rounded.layers, means["domain"]), [EoRA(2)])
    assert torch.equal(site.layers[0].weight_OI, by_hand.layers[0].weight_OI)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (Refit, {"iterations": -1}),
        (Swaps, {"candidates": 0}),
        (Swaps, {"rounds": -1}),
        (Swaps, {"group": 0}),
        (Swaps, {"group": -4}),
        (ALPS, {"sparsity": 0.5, "per": "layer"}),
        (ALPS, {"sparsity": 0.5, "iterations": 0}),
        (Descent, {"sweeps": -1}),
        (EoRA, {"rank": -1}),
        (SparseLowRank, {"sparsity": 0.5, "rank": 0}),
        *(
            (method, {**settings, "damping": damping})
            for method, settings in (
                (ALPS, {"sparsity": 0.5}),
                (SparseLowRank, {"sparsity": 0.5}),
                (Refit, {}),
                (QEP, {}),
            )
            for damping in (-0.1, float("nan"), float("inf"))
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(method: type, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        method(**settings)
