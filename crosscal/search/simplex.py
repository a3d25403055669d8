"""The weights over several corpora whose solution has the smallest geometric mean of their losses.

At the minimum over all solutions V of Σ_k v_k log E_k(V) the gradient Σ_k (v_k / E_k) ∇E_k is zero: V is what weights
w_k ∝ v_k / E_k ask for. So weights are solved, their losses give the next weights, and so on (majorise and minimise:
log E is below its tangent, so that with exact solvers no step makes the mean larger). Solvers are not exact, and held-
out losses are not those that were minimised, so the best of all weights tried is taken.

Around its minimum the mean is flat, and held-out text of another draw moves the minimum by a quarter of the way: of
weights whose means are alike the nearest to the corpora's own is taken (`benchmarks/alpha.py`: without this, weights
found on 32 held-out windows lost up to 2.3 % of perplexity, and 0.8 % on average; with it 1.1 and 0.3).

It takes as many solves for ten corpora as for three. Two corpora are a line (`crosscal.search.line`), which shows all
of the trade-off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from crosscal.search import line
from crosscal.search.geometric_mean import geometric_mean

MOST_SOLVES = 8
NEAR = 0.02
"""Weights that differ by less are not solved again."""
ALIKE = 0.01
"""Means that differ by less of themselves are not told apart by some thousand tokens of held-out text."""

Weights = tuple[float, ...]
Tried = Mapping[Weights, Sequence[float]]
"""Weights of the corpora -> their losses."""


def weights_to_try(tried: Tried, exponents: Sequence[float]) -> list[Weights]:
    """What to solve next; nothing once the search is over."""
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


def best_weights(tried: Tried, exponents: Sequence[float]) -> Weights:
    """Of those tried whose mean is alike the smallest, the nearest to the exponents."""
    means = {weights: geometric_mean(losses, exponents) for weights, losses in tried.items()}
    alike = [weights for weights in sorted(means, reverse=True) if means[weights] <= (1 + ALIKE) * min(means.values())]
    own = _normalised(exponents)
    return min(alike, key=lambda weights: (round(math.dist(weights, own), 4), means[weights]))


def balanced(losses: Sequence[float], exponents: Sequence[float]) -> Weights:
    """w_k ∝ v_k / E_k; where a loss is 0, all weight stays where the exponents have it."""
    if min(losses) <= 0:
        return _normalised(exponents)
    return _normalised([exponent / loss for exponent, loss in zip(exponents, losses, strict=True)])


def _normalised(weights: Sequence[float]) -> Weights:
    """Of sum 1, to four digits; the largest takes what rounding leaves."""
    total = sum(weights)
    rounded = [round(weight / total, 4) for weight in weights]
    rounded[rounded.index(max(rounded))] += 1.0 - sum(rounded)
    return tuple(rounded)
