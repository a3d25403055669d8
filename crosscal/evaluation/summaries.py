"""Summaries of measured numbers: over seeds, between two variants, the front of a trade-off; pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of repeated measurements; `sd` is None for a single one."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its standard error sd / sqrt(n), None for a single pair."""

    mean: float
    stderr: float | None
    n: int


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard deviation of one number over seeds."""
    values = list(values)
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """How much larger `first` is than `second`, item by item: the same seeds, or the same windows, in the same order.

    Pairing removes what both share (a hard window is hard for every variant), so differences far smaller than either
    number's own standard error can be told apart. Raises ValueError on unequal lengths.
    """
    differences = spread(a - b for a, b in zip(first, second, strict=True))
    stderr = None if differences.sd is None else differences.sd / math.sqrt(differences.n)
    return Difference(differences.mean, stderr, differences.n)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates, by rising first coordinate; smaller is better in both.

    A point dominates another when it is no worse in both coordinates and better in one, so equal points stay together.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
