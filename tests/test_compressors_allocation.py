"""Allocators: the model reaches the target sparsity, and layers are ordered as in the papers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from typing import Any

import pytest
import torch

from crosscal.compressors import DLP, OWL, Magnitude, Refit, Site, SparseGPT, Statistic, Statistics, Wanda, run, solve
from crosscal.compressors.allocation import PerLayer, sparsities_over, summarised
from crosscal.compressors.recipe import Placed, allotted, site_of
from crosscal.errors import StatisticsError, UsageError
from tests.helpers.problems import layer

SIZES = {"q": 40, "k": 8, "up": 64}


def block(number: int) -> list[Site]:
    """Two sites with three layers together; the tails of their weights differ from block to block."""
    heavy = layer(1, 96, seed=number, dead=[number]).hessian_II
    sites = []
    for name, members in (("attention", ("q", "k")), ("mlp", ("up",))):
        problems = [
            dataclasses.replace(
                layer(SIZES[each], 96, seed=10 * number + len(each)), hessian_II=heavy, name=f"{number}.{each}"
            )
            for each in members
        ]
        tails = [
            dataclasses.replace(p, weight_OI=p.weight_OI.sign() * p.weight_OI.abs() ** (number + 1)) for p in problems
        ]
        sites.append(dataclasses.replace(site_of(tails), name=f"{number}.{name}"))
    return sites


BLOCKS = [block(number) for number in range(4)]


def scores(sites: list[Site]) -> dict[str, list[float]]:
    """Return the scores |W_oi| √H_ii of each layer, in plain Python."""
    found = {}
    for site in sites:
        norms = [math.sqrt(value) for value in site.statistics.hessian_II.diagonal().tolist()]
        for one in site.layers:
            found[one.name] = [abs(w) * n for row in one.target_OI.tolist() for w, n in zip(row, norms, strict=True)]
    return found


def outlier_ratio(values: list[float], threshold: float) -> float:
    mean = math.fsum(values) / len(values)
    return sum(value > threshold * mean for value in values) / len(values)


@pytest.mark.parametrize("threshold", [2.0, 5.0])
def test_owl_counts_the_outliers_of_a_block_or_of_a_layer(threshold: float) -> None:
    for sites in BLOCKS:
        own = scores(sites)
        whole = outlier_ratio(list(itertools.chain.from_iterable(own.values())), threshold)
        assert OWL(threshold=threshold).summarise(sites) == dict.fromkeys(own, whole)
        alone = {name: outlier_ratio(values, threshold) for name, values in own.items()}
        assert OWL(threshold=threshold, per="layer").summarise(sites) == alone


def test_dlp_takes_the_median_of_a_block_or_of_a_layer() -> None:
    for sites in BLOCKS:
        own = scores(sites)
        whole = statistics.median_low(list(itertools.chain.from_iterable(own.values())))
        assert DLP().summarise(sites) == pytest.approx(dict.fromkeys(own, whole), rel=1e-12)
        alone = {name: statistics.median_low(values) for name, values in own.items()}
        assert DLP(per="layer").summarise(sites) == pytest.approx(alone, rel=1e-12)


def published(importances: list[float], target: float, spread: float) -> list[float]:
    """Sparsities by the authors' code for blocks of one size: kept fractions, scaled and shifted to mean 1 - target."""
    low, high = min(importances), max(importances)
    scaled = [(value - low) * (1 / (high - low) * spread * 2) for value in importances]
    kept = [value - statistics.mean(scaled) + 1 - target for value in scaled]
    return [1 - value for value in kept]


def test_blocks_of_one_size_get_what_the_papers_say() -> None:
    ratios = [0.01, 0.05, 0.02, 0.04]
    summary, weights = {str(n): r for n, r in enumerate(ratios)}, {str(n): 100 for n in range(4)}
    assert list(OWL(spread=0.08).allocate(summary, 0.7, weights).values()) == pytest.approx(
        published(ratios, 0.7, 0.08)
    )
    importances = [1 - ratio / sum(ratios) for ratio in ratios]
    assert list(DLP().allocate(summary, 0.7, weights).values()) == pytest.approx(published(importances, 0.7, 0.15))


@dataclasses.dataclass(frozen=True)
class Draw:
    """Random input of an allocator: summary and sizes of a model, target, spread; extremes and ties are frequent."""

    numbers: dict[str, float]
    weights: dict[str, int]
    target: float
    spread: float

    @property
    def total(self) -> int:
        return sum(self.weights.values())


def drawn(seed: int) -> Draw:
    chance = random.Random(seed)
    names = [str(n) for n in range(chance.randint(1, 12))]
    numbers = {name: chance.choice([0.0, 1.0, chance.random(), chance.random() ** 20]) for name in names}
    weights = {name: chance.choice([1, 100, chance.randint(1, 10**8)]) for name in names}
    target = chance.choice([0.0, 1.0, 0.5, chance.random()])
    return Draw(numbers, weights, target, chance.choice([1.0, 0.08, chance.random()]))


DRAWS = [drawn(seed) for seed in range(1000)]


@pytest.mark.parametrize("allocator", [OWL, DLP])
def test_an_allocation_meets_its_target_inside_0_and_1_and_in_order(allocator: Any) -> None:
    sign = 1 if allocator is DLP else -1  # sparsity rises with the median, and falls with the outlier ratio
    for draw in DRAWS:
        amounts = allocator(spread=draw.spread).allocate(draw.numbers, draw.target, draw.weights)
        mean = math.fsum(amounts[n] * draw.weights[n] for n in amounts) / draw.total
        assert mean == pytest.approx(draw.target, abs=1e-12)
        assert all(0 <= amount <= 1 for amount in amounts.values())
        order = sorted(draw.numbers, key=lambda n: sign * draw.numbers[n])
        assert all(amounts[a] <= amounts[b] for a, b in itertools.pairwise(order))
        removed = sum(round(amounts[n] * draw.weights[n]) for n in amounts)
        assert abs(removed - draw.target * draw.total) <= 0.5 * len(amounts) + 1e-11 * draw.total


def test_clamped_allocation_uses_one_common_shift() -> None:
    """All layers get one common shift, clamped to [0, 1]; the reference finds it by bisection."""
    cut = 0
    for draw in DRAWS:
        low, high = min(draw.numbers.values()), max(draw.numbers.values())
        wanted = {
            n: -2 * draw.spread * (x - low) / (high - low) if high > low else 0.0 for n, x in draw.numbers.items()
        }
        below, above = -1.0, 3.0
        for _ in range(80):
            middle = (below + above) / 2
            mean = sum(draw.weights[n] * min(max(wanted[n] + middle, 0), 1) for n in wanted) / draw.total
            below, above = (middle, above) if mean < draw.target else (below, middle)
        amounts = OWL(spread=draw.spread).allocate(draw.numbers, draw.target, draw.weights)
        # Roundoff of the total is amplified by total / weights in a layer of few weights.
        expected = {n: min(max(wanted[n] + below, 0), 1) for n in wanted}
        for n, amount in amounts.items():
            assert amount == pytest.approx(expected[n], abs=1e-9 + 1e-14 * draw.total / draw.weights[n])
        cut += any(amount in (0, 1) for amount in amounts.values()) and 0 < draw.target < 1
    assert cut > 50


def test_no_spread_is_no_allocation_bit_for_bit() -> None:
    for draw, allocator in itertools.product(DRAWS[:100], (OWL(spread=0), DLP(spread=0))):
        amounts = allocator.allocate(draw.numbers, draw.target, draw.weights)
        assert amounts == dict.fromkeys(draw.numbers, draw.target)
        recipe = (Placed(allocator), Placed(SparseGPT(draw.target)), Placed(Refit()))
        assert allotted(recipe, {draw.target: amounts}.__getitem__, list(amounts)) == recipe[1:]


@pytest.mark.parametrize("per", ["block", "layer"])
@pytest.mark.parametrize("method", [SparseGPT, Magnitude, Wanda])
def test_every_layer_of_a_model_is_solved_at_what_was_allotted_to_it(method: Any, per: Any) -> None:
    allocator = OWL(spread=0.2, threshold=3.0, per=per)
    sparsities_of = sparsities_over(allocator, BLOCKS)
    amounts, removed, layers = sparsities_of(0.6), 0, 0
    for site in itertools.chain.from_iterable(BLOCKS):
        names = [one.name for one in site.layers]
        recipe = allotted((Placed(allocator), Placed(method(0.6))), sparsities_of, names)
        assert len(names) == 1 or isinstance(recipe[0].step, PerLayer) == (per == "layer")
        done = solve(site, [recipe])[0]
        for one, after in zip(site.layers, done.layers, strict=True):
            alone = run(dataclasses.replace(site, layers=(one,)), [method(amounts[one.name])]).layers[0]
            torch.testing.assert_close(after.weight_OI, alone.weight_OI, rtol=1e-9, atol=1e-9)
            assert torch.equal(after.weight_OI == 0, alone.weight_OI == 0)
            zeros, layers = int((after.weight_OI == 0).sum()), layers + 1
            if method is not Wanda:  # which prunes a number per row
                assert zeros == round(amounts[one.name] * one.target_OI.numel())
            removed += zeros
    total = sum(one.target_OI.numel() for sites in BLOCKS for site in sites for one in site.layers)
    allowed = layers / 2 if method is not Wanda else sum(SIZES.values()) * len(BLOCKS) / 2
    assert abs(removed - 0.6 * total) <= allowed
    assert len(set(amounts.values())) == (len(BLOCKS) if per == "block" else layers)


def test_recipes_with_one_allocation_share_prefix_and_stack() -> None:
    """Recipes with one allocation share their first steps; one of another sparsity can be stacked with them."""
    site, sparsities_of = BLOCKS[0][0], sparsities_over(OWL(), BLOCKS)
    names = [one.name for one in site.layers]
    short = allotted((Placed(OWL()), Placed(SparseGPT(0.6))), sparsities_of, names)
    long = allotted((Placed(OWL()), Placed(SparseGPT(0.6)), Placed(Refit())), sparsities_of, names)
    other = allotted((Placed(OWL()), Placed(SparseGPT(0.7))), sparsities_of, names)
    assert short == long[:1]
    assert short[0].step.stack_key == other[0].step.stack_key == SparseGPT(0.5).stack_key


@pytest.mark.parametrize("allocator", [OWL(), DLP()])
def test_an_allocator_sees_what_it_declares(allocator: Any) -> None:
    site = BLOCKS[1][0]
    square_I = site.statistics.square_I
    means = {Statistic.SQUARE_SUM: square_I, Statistic.GRAM: torch.full((96, 96), torch.nan)}
    assert summarised(allocator, [dataclasses.replace(site, statistics=Statistics(means))]) == summarised(
        allocator, [site]
    )
    with pytest.raises(StatisticsError):
        summarised(allocator, [dataclasses.replace(site, statistics=Statistics({}))])


def test_an_expert_that_is_not_known_keeps_the_target() -> None:
    step = Placed(SparseGPT(0.6))
    assert allotted((Placed(OWL()), step), lambda _: {}, ["expert"]) == (step,)


@pytest.mark.parametrize("bad", [{"spread": -0.1}, {"spread": math.nan}, {"spread": 1.5}, {"per": "row"}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    for allocator in (OWL, DLP):
        with pytest.raises(UsageError, match="spread"):
            allocator(**bad)
    with pytest.raises(UsageError, match="threshold"):
        OWL(threshold=0)


def test_patterns_are_refused_from_python_too() -> None:
    with pytest.raises(UsageError, match="n:m"):
        run(BLOCKS[0][0], [OWL(), SparseGPT("2:4")])
