"""Statistics of measured numbers: over seeds, between two variants, and the Pareto front; pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of repeated measurements; `sd` is None for a single one."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of paired differences and its standard error sd / sqrt(n), None for a single pair."""

    mean: float
    stderr: float | None
    n: int
    dof: float
    """Degrees of freedom of the standard error: n - 1, or by `joined` for two sources of error."""


def spread(values: Iterable[float]) -> Spread:
    """Return mean and standard deviation of repeated measurements."""
    values = list(values)
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Return the mean of first - second, item by item: the same seeds, or the same windows, in the same order.

    Pairing removes what both share (a hard window is hard for every variant), so differences far smaller than either
    number's own standard error are distinguishable. Raises ValueError on unequal lengths.
    """
    differences = spread(a - b for a, b in zip(first, second, strict=True))
    stderr = None if differences.sd is None else differences.sd / math.sqrt(differences.n)
    return PairedDifference(differences.mean, stderr, differences.n, differences.n - 1)


def same_draws(first: Mapping[int | None, Value], second: Mapping[int | None, Value]) -> Iterator[tuple[Value, Value]]:
    """Yield the pairs of the same draw. The key None is of a model that is the same for every draw; it is paired with
    each of the other's."""
    draws = dict.fromkeys([*first, *second])
    for draw in [draw for draw in draws if draw is not None] or draws:
        one, other = first.get(draw, first.get(None)), second.get(draw, second.get(None))
        if one is not None and other is not None:
            yield one, other


def joined(over_items: PairedDifference, over_repeats: PairedDifference) -> PairedDifference:
    """Return the mean over items with the error over repeats added."""
    errors = [(each.stderr, each.dof) for each in (over_items, over_repeats) if each.stderr]
    if not errors:
        return over_items
    stderr, dof = added_errors(errors)
    return PairedDifference(over_items.mean, stderr, over_items.n, dof)


def added_errors(errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (standard error, degrees of freedom) of independent errors together, given the same of each: variances
    add, and by Welch and Satterthwaite dof = (a + b)^2 / (a^2 / dof_a + b^2 / dof_b) for the variances a and b. Known
    exactly: dof is infinite."""
    variance = math.fsum(stderr**2 for stderr, _ in errors)
    uncertainty = math.fsum(stderr**4 / dof for stderr, dof in errors)
    return math.sqrt(variance), variance**2 / uncertainty if uncertainty else math.inf


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point dominates, by rising first coordinate; smaller is better.

    A point dominates another when it is no worse in both coordinates and better in one, so equal points stay together.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
