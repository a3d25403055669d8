"""Recipes: what later steps keep and change of what earlier ones did, and which orders are refused.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

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
    Swaps,
    Wanda,
    run,
    solve,
)
from crosscal.compressors.recipe import check_order, site_of
from crosscal.errors import UsageError
from tests.helpers.problems import layer, loss_after

PRUNERS = [Magnitude(0.6), Wanda(0.6), SparseGPT(0.6), SparseGPT("2:4"), ALPS(0.6, iterations=30)]
ROUNDERS = [RoundToNearest(3, 32), GPTQ(3, 32), GPTQ(2, None), SparseGPTQ(0.4, 3, 32)]
PRUNED_AGAIN = [SparseGPT(0.8), SparseGPT("2:4"), SparseGPTQ("2:4", 4, 32), ALPS(0.8, iterations=20)]
REFINEMENTS = [Refit(), Refit(1), Refit(None), Swaps(20), Swaps(20, group=4), Scales(), Descent()]


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
