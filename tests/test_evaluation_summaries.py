"""Summary statistics against numpy and brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest

from crosscal.evaluation import paired_difference, pareto_front, spread


def test_spread_is_mean_and_sample_deviation() -> None:
    values = [3.0, 1.5, 2.25, 9.0]
    found = spread(iter(values))
    assert (found.mean, found.sd, found.n) == pytest.approx((np.mean(values), np.std(values, ddof=1), 4))
    assert spread([2.0]).sd is None


def test_pairing_removes_what_both_share() -> None:
    shared = np.random.default_rng(0).normal(scale=10, size=50)
    noise = np.random.default_rng(1).normal(scale=0.1, size=50)
    found = paired_difference(list(shared + 1 + noise), list(shared))
    assert found.mean == pytest.approx(1 + noise.mean())
    assert found.stderr == pytest.approx(np.std(noise, ddof=1) / np.sqrt(50))
    assert paired_difference([1.0], [0.5]).stderr is None
    with pytest.raises(ValueError, match=r"longer|shorter"):
        paired_difference([1.0, 2.0], [1.0])


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@pytest.mark.parametrize("seed", range(50))
def test_front_is_what_nothing_dominates(seed: int) -> None:
    chance = random.Random(seed)
    points = [(float(chance.randrange(8)), float(chance.randrange(8))) for _ in range(chance.randrange(1, 20))]
    expected = {i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)}
    front = pareto_front(points)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_front_of_nothing() -> None:
    assert pareto_front([]) == []
