"""Line search for the weight of two corpora whose solution has the smallest geometric mean of the two losses.

Five weights a quarter apart, then the midpoints on either side of the best: at most seven solves, in two rounds that
each read a corpus's statistics once. The mean is so flat around its minimum that a grid finer than an eighth changes it
by less than a thousandth (benchmarks/alpha.py). `crosscal.search.simplex.best_weights` makes the final choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from crosscal.search.geometric_mean import geometric_mean

FIRST = (0.0, 0.25, 0.5, 0.75, 1.0)
FINEST = 0.125
MOST_SOLVES = 7

TriedMixture = Mapping[float, Sequence[float]]
"""Weight of the second corpus -> the losses on the first and on the second."""


def weights_to_try(tried: TriedMixture, exponents: Sequence[float]) -> list[float]:
    """Return the weights to solve next; none once the search is finished."""
    if first := [weight for weight in FIRST if weight not in tried]:
        return first
    best, known = best_weight(tried, exponents), sorted(tried)
    at = known.index(best)
    beside = [*known[max(0, at - 1) : at], *known[at + 1 : at + 2]]
    return sorted((best + other) / 2 for other in beside if abs(best - other) > FINEST)


def best_weight(tried: TriedMixture, exponents: Sequence[float]) -> float:
    """Return the tried weight with the smallest geometric mean; the smallest weight among equals."""
    return min(sorted(tried), key=lambda weight: geometric_mean(tried[weight], exponents))
