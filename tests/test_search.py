"""Mixture searches on problems with known answers: the weights found, and limits on solves and evaluations."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.optimize import minimize

from crosscal.search import line, rule, screen, simplex
from crosscal.search.geometric_mean import geometric_mean

SEEDS = range(40)


def searched(
    solve: Callable[[simplex.Weights], Sequence[float]], exponents: Sequence[float]
) -> dict[simplex.Weights, Sequence[float]]:
    """Run a search to its end; return every mixture that it tried, with its losses."""
    tried: dict[simplex.Weights, Sequence[float]] = {}
    while wanted := simplex.weights_to_try(tried, exponents):
        assert not set(wanted) & set(tried), "nothing is solved twice"
        tried |= {weights: solve(weights) for weights in wanted}
    return tried


class Quadratics:
    """Losses (v - c_k)ᵀ H_k (v - c_k) + e_k, and the exact solution of their weighted sum."""

    def __init__(self, seed: int, corpora: int, *, apart: float = 1.0, inputs: int = 5) -> None:
        chance = np.random.default_rng(seed)
        factors_KII = chance.normal(size=(corpora, inputs, inputs))
        self.hessians_KII = factors_KII @ factors_KII.transpose(0, 2, 1) + 0.1 * np.eye(inputs)
        self.centres_KI = apart * chance.normal(size=(corpora, inputs))
        self.floors_K = chance.uniform(0.5, 1.0, corpora)

    def losses(self, solution_I: np.ndarray) -> list[float]:
        away_KI = solution_I - self.centres_KI
        return list(np.einsum("ki,kij,kj->k", away_KI, self.hessians_KII, away_KI) + self.floors_K)

    def solve(self, weights: Sequence[float]) -> list[float]:
        weights_K = np.array(weights)
        mixed_II = np.einsum("k,kij->ij", weights_K, self.hessians_KII)
        right_I = np.einsum("k,kij,kj->i", weights_K, self.hessians_KII, self.centres_KI)
        return self.losses(np.linalg.solve(mixed_II, right_I))

    def least(self, exponents: Sequence[float]) -> float:
        """Return the smallest geometric mean over weights, by Nelder-Mead from several starts."""

        def objective(logs: np.ndarray) -> float:
            weights = np.exp(logs - logs.max())
            return geometric_mean(self.solve(list(weights / weights.sum())), exponents)

        starts = np.random.default_rng(0).normal(size=(4, len(exponents)))
        return min(minimize(objective, start, method="Nelder-Mead").fun for start in starts)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_a_line_the_best_eighth_is_found_in_seven_solves(seed: int) -> None:
    problem = Quadratics(seed, 2)
    chance = random.Random(seed)
    share = chance.uniform(0.2, 0.8)
    exponents = [1 - share, share]
    tried = searched(problem.solve, exponents)
    assert len(tried) <= line.MOST_SOLVES
    means = {step: geometric_mean(problem.solve([1 - step / 8, step / 8]), exponents) for step in range(9)}
    valleys = [s for s in range(9) if all(means[s] <= means[o] for o in (s - 1, s + 1) if o in means)]
    if len(valleys) == 1:
        assert min(tried, key=lambda weights: geometric_mean(tried[weights], exponents))[1] == valleys[0] / 8


@pytest.mark.parametrize(("seed", "corpora"), [*itertools.product(range(10), (3, 5))])
def test_over_several_corpora_no_step_is_worse_and_of_alike_ones_the_best_is_found(seed: int, corpora: int) -> None:
    """Odd seeds: corpora as alike as texts; the optimum of one loses up to a few times the minimum on another."""
    apart = 0.4 if seed % 2 else 2.0
    problem = Quadratics(seed, corpora, apart=apart)
    weights = np.random.default_rng(seed).uniform(0.5, 2.0, corpora)
    exponents = list(weights / weights.sum())
    tried = searched(problem.solve, exponents)
    assert len(tried) <= simplex.MOST_SOLVES
    means = [geometric_mean(losses, exponents) for losses in tried.values()]
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(means))
    if apart < 1:
        assert min(means) <= 1.01 * problem.least(exponents)
    assert sum(simplex.best_weights(tried, exponents)) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_among_near_equal_means_the_weights_nearest_to_the_exponents_are_chosen(seed: int) -> None:
    """Among weights whose mean is within 1 % of the smallest, those nearest to the exponents are chosen."""
    chance = random.Random(seed)
    problem, share = Quadratics(seed, 2, apart=chance.choice([0.2, 1.0])), chance.uniform(0.2, 0.8)
    exponents = [1 - share, share]
    tried = searched(problem.solve, exponents)
    means = {weights: geometric_mean(losses, exponents) for weights, losses in tried.items()}
    taken = simplex.best_weights(tried, exponents)
    assert means[taken] <= 1.01 * min(means.values())
    nearer = [weights for weights in tried if abs(weights[1] - share) < abs(taken[1] - share) - 1e-3]
    assert all(means[weights] > 1.01 * min(means.values()) for weights in nearer)
    half = [0.5, 0.5]
    flat = {(1 - w, w): [1 + 0.01 * (w - 0.2) ** 2 + chance.uniform(0, 0.003)] * 2 for w in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert simplex.best_weights(flat, half) == (0.5, 0.5), "whatever the noise of a thousandth says"


def test_a_corpus_that_counts_twice_gets_a_smaller_loss() -> None:
    problem = Quadratics(3, 3)
    even, twice = [1 / 3] * 3, [0.25, 0.25, 0.5]
    of_even, of_twice = searched(problem.solve, even), searched(problem.solve, twice)
    before = of_even[simplex.best_weights(of_even, even)][2]
    assert of_twice[simplex.best_weights(of_twice, twice)][2] < before


def test_losses_of_zero_end_a_search() -> None:
    """If nothing was removed, all mixtures are equally good."""
    for corpora in (2, 3):
        tried = searched(lambda weights: [0.0] * len(weights), [1 / corpora] * corpora)
        assert len(tried) <= line.MOST_SOLVES


class Curve:
    """Losses of mixtures, and perplexities that rise faster than linearly with them, optionally with noise."""

    def __init__(self, seed: int, *, noise: float = 0.0) -> None:
        chance = random.Random(seed)
        self.up, self.down = chance.uniform(1.0, 4.0), chance.uniform(1.0, 4.0)
        self.bend, self.dip, self.noise = chance.uniform(1.0, 3.0), chance.uniform(0.0, 0.02), noise
        self.chance = chance

    def losses(self, weight: float) -> tuple[float, float]:
        return 0.02 + 0.02 * weight ** (1 + self.up), 0.02 + 0.03 * (1 - weight) ** (1 + self.down)

    def perplexities(self, weight: float) -> tuple[float, float]:
        general, domain = self.losses(weight)
        rise = (general - 0.02) / 0.02
        log_general = 0.15 + 0.08 * rise**self.bend - self.dip * math.sin(math.pi * weight)
        wobble = self.chance.gauss(0, self.noise) if self.noise else 0.0
        return 80 * math.exp(log_general + wobble), 50 * math.exp(6 * domain)

    DENSE = (80.0, 50.0)


def ruled(curve: Curve, within: float) -> tuple[float, dict[float, tuple[float, float]]]:
    losses = {weight: curve.losses(weight) for weight in line.FIRST}
    evaluated: dict[float, tuple[float, float]] = {}
    while (weight := rule.next_weight(losses, Curve.DENSE, evaluated, within)) is not None:
        assert weight not in evaluated
        assert 0 <= weight <= 1
        evaluated[weight] = curve.perplexities(weight)
        losses[weight] = curve.losses(weight)
    return rule.chosen_weight(evaluated, within), evaluated


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("within", [0.005, 0.02, 0.1])
def test_a_rule_is_kept_with_three_evaluated_and_little_is_lost(seed: int, within: float) -> None:
    curve = Curve(seed)
    taken, evaluated = ruled(curve, within)
    assert len(evaluated) <= 1 + rule.MOST_EVALUATED
    general, domain = curve.perplexities(0.0)
    assert curve.perplexities(taken)[0] <= (1 + within) * general
    grid = [step / 100 for step in range(101)]
    kept = [w for w in grid if curve.perplexities(w)[0] <= (1 + within) * general]
    best = min(curve.perplexities(w)[1] for w in kept)
    assert curve.perplexities(taken)[1] <= domain
    assert curve.perplexities(taken)[1] <= 1.01 * best


@pytest.mark.parametrize("rise", [0.05, 0.1, 0.2])
def test_rule_is_kept_when_losses_do_not_predict_perplexity(
    rise: float,
) -> None:
    """The general loss is flat up to weight 0.4, but the general perplexity rises from weight 0 on."""
    evaluated: dict[float, tuple[float, float]] = {}
    losses = {weight: (0.02 + 0.02 * max(0.0, weight - 0.4), 0.05 - 0.03 * weight) for weight in line.FIRST}
    while (weight := rule.next_weight(losses, Curve.DENSE, evaluated, 0.02)) is not None:
        evaluated[weight] = 100 * math.exp(rise * weight), 60 * math.exp(-weight)
    best = math.log(1.02) / rise
    assert 0.75 * best <= rule.chosen_weight(evaluated, 0.02) <= best


@pytest.mark.parametrize("seed", range(20))
def test_what_is_taken_was_measured_to_keep_the_rule_whatever_the_noise(seed: int) -> None:
    taken, evaluated = ruled(Curve(seed, noise=0.03), 0.02)
    assert evaluated[taken][0] <= 1.02 * evaluated[0.0][0]
    assert evaluated[taken][1] <= evaluated[0.0][1]
    assert len(evaluated) <= 1 + rule.MOST_EVALUATED


def test_where_every_candidate_breaks_the_rule_general_only_is_taken() -> None:
    evaluated = {0.0: (90.0, 60.0), 0.4: (99.0, 50.0), 0.2: (95.0, 52.0), 0.1: (93.0, 54.0)}
    losses = {weight: Curve(0).losses(weight) for weight in line.FIRST}
    assert rule.next_weight(losses, Curve.DENSE, evaluated, 0.02) is None
    assert rule.chosen_weight(evaluated, 0.02) == 0.0


@pytest.mark.parametrize("sd", [0.001, 0.05, 0.3])
def test_the_windows_that_a_rule_asks_for_suffice_and_one_less_would_not(sd: float) -> None:
    needed = rule.windows_needed(16, sd / math.sqrt(16), 0.02)
    assert sd / math.sqrt(needed) <= rule.RESOLVED * 0.02
    assert needed == 1 or sd / math.sqrt(needed - 1) > rule.RESOLVED * 0.02


@pytest.mark.parametrize("seed", range(20))
def test_only_what_another_beats_clearly_on_every_corpus_is_ruled_out(seed: int) -> None:
    chance = random.Random(seed)
    losses = {f"m{i}": {c: chance.uniform(0.01, 0.02) for c in ("general", "legal")} for i in range(12)}
    losses["elsewhere"] = {"general": 0.001}
    found = screen.ruled_out(losses, 0.05)
    for name, better in found.items():
        assert all(losses[better][c] <= 0.95 * losses[name][c] for c in losses[name])
        assert better not in found
    for name in losses.keys() - found.keys() - {"elsewhere"}:
        others = [each for each in losses if losses[each].keys() == losses[name].keys() and each != name]
        assert not any(all(losses[o][c] <= 0.95 * losses[name][c] for c in losses[name]) for o in others)
    assert screen.ruled_out({"a": {"general": 0.0}, "b": {"general": 0.0}}) == {}
