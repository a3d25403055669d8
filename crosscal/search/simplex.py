"""Search for the weights of several corpora whose solution has the smallest geometric mean of their losses.

At the minimum over all solutions V of Σ_k v_k log E_k(V) the gradient Σ_k (v_k / E_k) ∇E_k is zero: V is the solution
for weights w_k ∝ v_k / E_k. So the losses of one solution give the weights of the next (majorise-minimise: log E lies
below its tangent, so with exact solvers no step increases the mean). Solvers are not exact, and held-out losses are not
the minimised ones, so the best of all tried weights is chosen.

The mean is flat around its minimum, and another held-out sample moves the minimum by a quarter of the way. So among
weights of nearly equal means, those nearest to the exponents are chosen (`benchmarks/alpha.py`: without this, weights
found on 32 held-out windows lost up to 2.3 % of perplexity, and 0.8 % on average; with it 1.1 and 0.3).

It takes as many solves for ten corpora as for three. For two corpora a line search (`crosscal.search.line`) shows the
whole trade-off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from crosscal.search import line
from crosscal.search.geometric_mean import geometric_mean

MOST_SOLVES = 8
NEAR = 0.02
"""Weights that differ by less from solved ones are not solved."""
ALIKE = 0.01
"""Means of a smaller relative difference are indistinguishable on a few thousand tokens of held-out text."""

Weights = tuple[float, ...]
TriedMixture = Mapping[Weights, Sequence[float]]
"""Weights of the corpora -> their losses."""


def weights_to_try(tried: TriedMixture, exponents: Sequence[float]) -> list[Weights]:
    """Return the weights to solve next; none once the search is finished."""
    if len(exponents) == 2:
        on_line = {weights[1]: losses for weights, losses in tried.items()}
        return [(1.0 - weight, weight) for weight in line.weights_to_try(on_line, exponents)]
    wanted = _normalised(exponents)
    for _ in range(MOST_SOLVES):
        if wanted not in tried:
            near = any(max(abs(a - b) for a, b in zip(wanted, other, strict=True)) < NEAR for other in tried)
            return [] if near else [wanted]
        wanted = balanced(tried[wanted], exponents)
    return []


def best_weights(tried: TriedMixture, exponents: Sequence[float]) -> Weights:
    """Return the tried weights nearest to the exponents, among those with a mean close to the smallest."""
    means = {weights: geometric_mean(losses, exponents) for weights, losses in tried.items()}
    alike = [weights for weights in sorted(means, reverse=True) if means[weights] <= (1 + ALIKE) * min(means.values())]
    own = _normalised(exponents)
    return min(alike, key=lambda weights: (round(math.dist(weights, own), 4), means[weights]))


def balanced(losses: Sequence[float], exponents: Sequence[float]) -> Weights:
    """Return w_k ∝ v_k / E_k, summing to 1; the exponents themselves if a loss is 0."""
    if min(losses) <= 0:
        return _normalised(exponents)
    return _normalised([exponent / loss for exponent, loss in zip(exponents, losses, strict=True)])


def _normalised(weights: Sequence[float]) -> Weights:
    """Scale to sum 1, rounded to four digits; the largest weight takes the rounding remainder."""
    total = sum(weights)
    rounded = [round(weight / total, 4) for weight in weights]
    rounded[rounded.index(max(rounded))] += 1.0 - sum(rounded)
    return tuple(rounded)
