"""The weight between two corpora whose solution has the smallest geometric mean of the two losses.

Five weights a quarter apart, then the middles on either side of the best: seven solves at most, in two rounds of which
each reads a corpus's statistics once. Around its minimum the mean is so flat that weights finer than an eighth move it
by less than a thousandth (benchmarks/alpha.py). Which is taken: `crosscal.search.simplex.best_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from crosscal.search.geometric_mean import geometric_mean

FIRST = (0.0, 0.25, 0.5, 0.75, 1.0)
FINEST = 0.125
MOST_SOLVES = 7

Tried = Mapping[float, Sequence[float]]
"""Weight of the second corpus -> the losses on the first and on the second."""


def weights_to_try(tried: Tried, exponents: Sequence[float]) -> list[float]:
    """What to solve next; nothing once the search is over."""
    if first := [weight for weight in FIRST if weight not in tried]:
        return first
    best, known = best_weight(tried, exponents), sorted(tried)
    at = known.index(best)
    beside = [*known[max(0, at - 1) : at], *known[at + 1 : at + 2]]
    return sorted((best + other) / 2 for other in beside if abs(best - other) > FINEST)


def best_weight(tried: Tried, exponents: Sequence[float]) -> float:
    """Of those tried; the smallest weight where several are alike."""
    return min(sorted(tried), key=lambda weight: geometric_mean(tried[weight], exponents))
