"""McNemar's test on paired answers, against a plain reference and SciPy."""

from __future__ import annotations

import math
import random

import pytest
from scipy.stats import binomtest

from crosscal.evaluation.mcnemar import AnswerChange, change, exact_p


def plain_p(lost: int, won: int) -> float:
    """Sum the probabilities of all outcomes of n fair coins at least as far from n / 2, in float64."""
    n = lost + won
    far = abs(won - n / 2)
    return min(1.0, sum(math.comb(n, k) * 0.5**n for k in range(n + 1) if abs(k - n / 2) >= far))


@pytest.mark.parametrize("n", [*range(25), 100, 999])
def test_p_is_that_of_a_plain_sum_and_of_scipy(n: int) -> None:
    for won in {0, 1, 2, n // 3, n // 2, n - 1, n} & set(range(n + 1)):
        assert exact_p(n - won, won) == pytest.approx(plain_p(n - won, won), rel=1e-9)
        assert exact_p(n - won, won) == exact_p(won, n - won)
        if n:
            assert exact_p(n - won, won) == pytest.approx(binomtest(won, n).pvalue, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_change_counts_the_questions_on_which_two_differ(seed: int) -> None:
    draw = random.Random(seed)
    before, after = ([draw.random() < share for _ in range(120)] for share in (0.7, 0.5))
    found = change(before, after)
    assert found.points == pytest.approx(100 * (sum(after) - sum(before)) / 120)
    assert found.lost == sum(a > b for a, b in zip(before, after, strict=True))
    back = change(after, before)
    assert (back.lost, back.won, back.p, back.points) == (found.won, found.lost, found.p, -found.points)
    assert change(before, before) == AnswerChange(120, 0, 0)
    assert change(before, before).p == 1
    with_more = change([*before, *[True] * 99], [*after, *[True] * 99])
    assert with_more.p == found.p  # questions that both answer alike do not change p


def test_in_words() -> None:
    assert str(AnswerChange(119, 12, 7)) == "−4.2 points, 12 lost / 7 won, p = .36"
    assert str(AnswerChange(100, 0, 0)) == "+0.0 points, 0 lost / 0 won, p = 1"
    assert str(AnswerChange(100, 30, 0)) == "−30.0 points, 30 lost / 0 won, p < .001"
    assert str(AnswerChange(400, 12, 31)) == "+4.8 points, 12 lost / 31 won, p = .0054"


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        change([True, False], [True])
    with pytest.raises(ValueError, match="no questions"):
        change([], [])
