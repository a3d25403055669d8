"""Intervals over draws and windows: equal to plain references, and not narrowed by duplicated data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from crosscal.evaluation.inference import DRAWS, QUESTIONS, WINDOWS, holm, over_both, over_draws, over_draws_and_items

DIFFERENCES_DW = np.random.default_rng(0).normal(0.02, 0.05, (4, 12)) + np.linspace(-0.1, 0.1, 12)


def test_over_draws_it_is_the_paired_t_test_of_the_draws_means() -> None:
    found, means_D = over_draws_and_items(DIFFERENCES_DW.tolist()), DIFFERENCES_DW.mean(axis=1)
    reference = stats.ttest_1samp(means_D, 0.0)
    assert found.over == DRAWS
    assert (found.draws, found.items) == (4, 12)
    assert found.mean == pytest.approx(means_D.mean())
    assert found.sd == pytest.approx(means_D.std(ddof=1))
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.p == pytest.approx(reference.pvalue)
    assert found.stderr == pytest.approx(stats.sem(DIFFERENCES_DW.mean(axis=0)))


def test_with_one_draw_it_is_the_t_test_of_the_windows() -> None:
    found, reference = over_draws_and_items(DIFFERENCES_DW[:1].tolist()), stats.ttest_1samp(DIFFERENCES_DW[0], 0.0)
    assert (found.over, found.sd) == (WINDOWS, None)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.p == pytest.approx(reference.pvalue)


def test_duplicates_do_not_narrow_intervals() -> None:
    """Duplicated windows do not narrow the interval over draws; duplicated draws do not lower the windows' error."""
    once = over_draws_and_items(DIFFERENCES_DW.tolist())
    more_windows = over_draws_and_items(np.tile(DIFFERENCES_DW, (1, 2)).tolist())
    assert more_windows.interval == pytest.approx(once.interval)
    assert more_windows.p == pytest.approx(once.p)
    more_draws = over_draws_and_items(np.tile(DIFFERENCES_DW, (2, 1)).tolist())
    assert more_draws.stderr == pytest.approx(once.stderr)


def test_the_interval_over_draws_holds_the_truth_in_19_of_20_studies() -> None:
    """Simulation: windows vary far more than draws, and a window's deviation is common to all draws."""
    generator, covered, studies = np.random.default_rng(1), 0, 2000
    windows_W = generator.normal(0, 1.0, 8)
    truth = 0.1 + windows_W.mean()
    for _ in range(studies):
        draws_DW = 0.1 + windows_W + generator.normal(0, 0.05, (3, 1)) + generator.normal(0, 0.05, (3, 8))
        low, high = over_draws_and_items(draws_DW.tolist()).interval or (0, 0)
        covered += low <= truth <= high
    assert covered / studies == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / studies))


@pytest.mark.parametrize("draws", [2, 3, 5])
@pytest.mark.parametrize("window_noise", [0.1, 8.0])
def test_the_interval_over_draws_and_windows_holds_the_truth_in_19_of_20_studies(
    draws: int, window_noise: float
) -> None:
    """Simulation: a study draws calibration text and 64 test windows, which its draws share. The interval may hold the
    truth more often where one source has hardly any degrees of freedom, never less often."""
    generator, studies = np.random.default_rng(2), 1000
    covered = 0
    for _ in range(studies):
        values_DW = generator.normal(0, 1.0, (draws, 1)) + generator.normal(0, window_noise, 64)
        low, high = over_both(over_draws_and_items(values_DW.tolist())) or (0, 0)
        covered += low <= 0 <= high
    error = 3 * math.sqrt(0.95 * 0.05 / studies)
    assert 0.95 - error <= covered / studies <= 0.99


def test_with_one_source_known_the_interval_over_both_is_over_that_one() -> None:
    one_draw = over_draws_and_items(DIFFERENCES_DW[:1].tolist())
    one_window = over_draws_and_items(DIFFERENCES_DW[:, :1].tolist())
    assert over_both(one_draw) == pytest.approx(one_draw.interval)
    assert over_both(one_window) == pytest.approx(one_window.interval)
    assert over_both(over_draws([0.5], None, QUESTIONS)) is None
    assert over_both(over_draws_and_items([[0.5, 0.5], [0.5, 0.5]])) == (0.5, 0.5)


def test_accuracies_are_over_draws_or_over_questions() -> None:
    several, one = over_draws([0.5, 0.6, 0.55], 0.05, QUESTIONS), over_draws([0.5], 0.05, QUESTIONS)
    assert several.over == DRAWS
    assert several.interval == pytest.approx(tuple(stats.ttest_1samp([0.5, 0.6, 0.55], 0).confidence_interval(0.95)))
    assert one.over == QUESTIONS
    assert one.interval == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), rel=1e-4)
    low, high = over_both(several) or (0, 0)
    draws, questions = 0.05**2 / 3, 0.05**2
    width = stats.t.ppf(0.975, (draws + questions) ** 2 / (draws**2 / 2))  # only the draws' variance is an estimate
    assert (high - low) / 2 == pytest.approx(width * math.sqrt(draws + questions))
    assert over_draws([0.5], None, QUESTIONS).interval is None


def test_no_deviation_at_all() -> None:
    assert over_draws_and_items([[0.5, 0.5], [0.5, 0.5]]).p == 0
    assert over_draws_and_items([[0.0, 0.0], [0.0, 0.0]]).p == 1


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_the_step_down_procedure_does(seed: int) -> None:
    p_values = (np.random.default_rng(seed).random(7) ** 4).tolist()
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected: set[int] = set()
        for count, index in enumerate(sorted(range(7), key=lambda i: p_values[i])):
            if p_values[index] > level / (7 - count):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(adjusted) if p <= level} == rejected
    assert all(p <= new <= 1 for p, new in zip(p_values, adjusted, strict=True))


def test_holm_does_not_depend_on_the_order() -> None:
    p_values = [0.04, 0.01, 0.3, 0.01]
    known = dict(zip(p_values, holm(p_values), strict=True))
    for order in itertools.permutations(p_values):
        assert holm(order) == [known[p] for p in order]
    assert holm([]) == []
