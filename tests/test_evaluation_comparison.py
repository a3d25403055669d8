"""The rule by which models are distinguishable, against scipy's t-test and simulations with known truth."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from crosscal.evaluation.choice import choose
from crosscal.evaluation.comparison import LEVEL, change_text, excess, is_distinguishable, log_difference, margin
from crosscal.evaluation.summaries import PairedDifference, joined, paired_difference


def made(seed: int, windows: int, mean: float = 0.0, sd: float = 0.05) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, sd, windows))


@pytest.mark.parametrize("windows", [2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(5))
def test_for_one_comparison_it_is_the_paired_t_test(windows: int, seed: int) -> None:
    one, other = made(seed, windows, 3.01), made(seed + 100, windows, 3.0)
    found = log_difference({0: one}, {0: other})
    assert found is not None
    expected = stats.ttest_rel(one, other)
    assert found.mean == pytest.approx(np.mean(one) - np.mean(other))
    assert found.mean / (found.stderr or 0) == pytest.approx(expected.statistic)
    assert is_distinguishable(found) == (expected.pvalue < LEVEL)
    interval = expected.confidence_interval(1 - LEVEL)
    assert (found.mean - margin(found), found.mean + margin(found)) == pytest.approx(tuple(interval))
    for comparisons in (3, 10):
        assert is_distinguishable(found, comparisons) == (expected.pvalue < LEVEL / comparisons)


def test_one_window_and_windows_that_are_not_the_same_show_nothing() -> None:
    alone = paired_difference([1.0], [0.5])
    assert margin(alone) == math.inf
    assert not is_distinguishable(alone)
    assert excess(alone, 1e9) == math.inf
    assert log_difference({0: [1.0]}, {0: [0.5]}) is None
    assert log_difference({0: [1.0, 2.0]}, {0: [1.0, 2.0, 3.0]}) is None
    assert log_difference({}, {0: [1.0, 2.0]}) is None
    assert log_difference({0: [1.0, 2.0]}, {1: [1.0, 3.0]}) is None


def test_a_model_is_not_told_from_itself_and_keeps_every_bound() -> None:
    same = log_difference({0: made(0, 8)}, {0: made(0, 8)})
    assert same is not None
    assert not is_distinguishable(same)
    assert excess(same, 0.0) <= 0.0


def test_what_is_shown_is_shown_of_any_looser_bound_and_by_fewer_comparisons() -> None:
    found = log_difference({0: made(1, 16, 3.04)}, {0: made(2, 16, 3.0)})
    assert found is not None
    shown = [excess(found, most / 100) for most in range(20)]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > 0 > shown[-1]
    assert [excess(found, 0.05, k) for k in range(1, 9)] == sorted(excess(found, 0.05, k) for k in range(1, 9))


@pytest.mark.parametrize(("windows", "candidates"), [(4, 2), (8, 10), (24, 6)])
def test_chance_is_seldom_taken_for_a_difference(windows: int, candidates: int) -> None:
    """Simulate equally good candidates; the share of false claims must not exceed the stated level."""
    chance, trials = np.random.default_rng(windows), 500
    claimed = lost = 0
    for _ in range(trials):
        shared = chance.normal(0, 0.3, windows)
        nll = shared + chance.normal(0, 0.05, (candidates + 1, windows))
        base, *others = ([list(each)] for each in nll)
        found = [paired_difference(other[0], base[0]) for other in others]
        claimed += any(is_distinguishable(each, candidates) for each in found)
        lowest = min(others, key=lambda each: sum(each[0]))
        best = paired_difference(others[0][0], lowest[0])  # by symmetry any of them may count as the truly best
        lost += is_distinguishable(best, candidates - 1)
    error = 3 * math.sqrt(LEVEL / trials)
    assert claimed / trials < LEVEL + error
    assert lost / trials < LEVEL + error
    if candidates > 2:
        assert claimed > 0.2 * LEVEL * trials, "and is no more cautious than it has to be"


def test_seeds_add_their_deviation_and_take_away_degrees_of_freedom() -> None:
    windows, repeats = PairedDifference(0.1, 0.02, 50, 49), PairedDifference(0.1, 0.03, 3, 2)
    found = joined(windows, repeats)
    a, b = 0.02**2, 0.03**2
    assert (found.mean, found.n, found.stderr) == (0.1, 50, pytest.approx(math.hypot(0.02, 0.03)))
    assert found.dof == pytest.approx((a + b) ** 2 / (a**2 / 49 + b**2 / 2))
    assert 2 < found.dof < 49
    assert margin(found) > margin(windows)
    one, other = ({seed: made(seed, 12, mean) for seed in range(3)} for mean in (3.0, 3.2))
    both = log_difference(one, other)
    assert both
    assert both.mean == pytest.approx(np.mean(list(one.values())) - np.mean(list(other.values())))


def test_seeds_are_compared_with_the_same_seed_alone() -> None:
    """A seed that is hard for both models says nothing about their difference; seeds 0 and 2 are missing in one each.
    A model without seeds is compared with every seed of the other, whose deviation adds to the error."""
    hard = dict(enumerate((0.3, -0.2, 0.1)))
    one, other = ({seed: made(seed, 8, 3.0 + hard[seed] + more) for seed in hard} for more in (0.02, 0.0))
    found = log_difference({0: one[0], 1: one[1]}, {1: other[1], 2: other[2]})
    assert found == log_difference({1: one[1]}, {1: other[1]})
    assert found
    assert found.mean == pytest.approx(0.02)
    without = made(9, 8, 3.0)
    assert log_difference({None: without}, one) == log_difference(dict.fromkeys(one, without), one)


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (-0.012, 0.003, "better by 1.19 ± 0.30 %"),
        (0.0488, 0.0123, "worse by 5.0 ± 1.3 %"),
        (0.0488, 0.0023, "worse by 5.00 ± 0.24 %"),
        (0.0, 0.0, "worse by 0.00 ± 0.00 %"),
        (-0.7, 0.2, "better by 50.3 ± 9.9 %"),
        (0.0123, None, "worse by 1.2 %"),
    ],
)
def test_a_change_is_said_in_percent_of_perplexity(mean: float, stderr: float | None, text: str) -> None:
    assert change_text(PairedDifference(mean, stderr, 9, 8)) == text


@pytest.mark.parametrize("seed", range(60))
def test_a_choice_against_the_rule_written_out(seed: int) -> None:
    chance = random.Random(seed)
    count, windows = chance.randrange(1, 9), chance.choice([2, 5, 30])
    general = [chance.uniform(90, 110) for _ in range(count)]
    hard = [chance.gauss(0, 0.3) for _ in range(windows)]
    own = [chance.uniform(3.9, 4.0) for _ in range(count)]
    nll = [[level + shared + chance.gauss(0, 0.02) for shared in hard] for level in own]
    law = [math.exp(sum(each) / windows) for each in nll]
    found = choose(list(zip(general, law, strict=True)), lambda i, j: log_difference({0: nll[i]}, {0: nll[j]}))
    front = {i for i in range(count) if not any(general[j] < general[i] and law[j] < law[i] for j in range(count))}
    lowest = min(range(count), key=lambda i: law[i])
    alike = {
        i for i in front
        if i == lowest or stats.ttest_rel(nll[i], nll[lowest]).pvalue >= 0.05 / (len(front) - 1)
    }  # fmt: skip
    assert set(found.front) == front
    assert (found.lowest, set(found.alike), found.windows) == (lowest, alike, windows)
    assert found.chosen == min(alike, key=lambda i: general[i])
