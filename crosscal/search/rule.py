"""Search for the domain weight with the lowest domain perplexity at a bounded general perplexity, in few evaluations.

Log perplexity is modelled as a function of the mean relative loss E on the same corpus. It is measured at general-only
calibration, and its slope is estimated from there to the dense model, of loss 0. That is steeper than the slope between
mixtures (measured: twice as steep on one model; on another the perplexity first falls), so the first weight is safe,
and its evaluation corrects the slope for the next. While all weights keep the bound, the next follows from the secant
from general-only calibration, or is half of the remaining way if less than half of the bound was used. Between a weight
that keeps the bound and one that breaks it, log perplexity is interpolated linearly, which lies above a convex curve.
While only general-only calibration keeps the bound, it is also interpolated over the weight, and the smaller result is
used: measured, E may not rise at all up to a weight where perplexity has risen by 4 %. The final weight was evaluated
and keeps the bound; it may be general-only calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

MOST_EVALUATED = 3
"""Maximum number of evaluated weights, besides the dense model and general-only calibration."""
FLATTEST = 4.0
"""A measured slope is taken as at least a fourth of the estimate; else one flat stretch would allow any weight."""
LEAST_SLOPE = 1e-12
"""Lower bound of the estimate, for general-only calibration that is no worse than the dense model."""
NEAR = 0.02
"""Weights that differ by less from an evaluated one are not evaluated."""
LEAST_GAIN = 0.001
"""Predicted gain of log perplexity on the domain below which a weight is not evaluated."""
RESOLVED = 0.25
"""Standard error of a change of general perplexity, as a share of the bound, at which its windows suffice."""

Pair = Sequence[float]
"""(general, domain)."""


def next_weight(
    losses: Mapping[float, Pair], dense: Pair, evaluated: Mapping[float, Pair], within: float
) -> float | None:
    """Return the weight to evaluate next; None once the search is finished.

    `losses`: weight -> mean relative losses, with weights 0 and 1; `dense`: perplexities; `evaluated`: weight ->
    perplexities, all on validation windows; `within`: allowed relative rise of general perplexity over general-only.
    """
    if 0.0 not in evaluated:
        return 0.0
    tried = [weight for weight in evaluated if weight > 0.0]
    if len(tried) >= MOST_EVALUATED or losses[0.0][0] <= 0 or losses[0.0][1] <= 0:
        return None
    wanted = _estimate(losses, dense, evaluated, math.log1p(within))
    taken = chosen_weight(evaluated, within)
    if any(abs(wanted - weight) < NEAR for weight in evaluated):
        return None
    return wanted if _gain(losses, dense, evaluated, taken, wanted) >= LEAST_GAIN else None


def chosen_weight(evaluated: Mapping[float, Pair], within: float) -> float:
    """Return the evaluated weight of the lowest domain perplexity among those that keep the bound; 0 always does."""
    most = evaluated[0.0][0] * (1.0 + within)
    kept = [weight for weight in sorted(evaluated) if weight == 0.0 or evaluated[weight][0] <= most]
    return min(kept, key=lambda weight: evaluated[weight][1])


def windows_needed(windows: int, stderr: float, within: float) -> int:
    """Return how many windows bring a relative change's standard error, measured on `windows`, to `RESOLVED` · within.

    The error falls with the root of their number: windows · (stderr / (`RESOLVED` · within))².
    """
    return math.ceil(windows * (stderr / (RESOLVED * within)) ** 2)


def losses_at(losses: Mapping[float, Pair], weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return losses [weights, (general, domain)], interpolated between solved weights by monotone cubics (PCHIP)."""
    from scipy.interpolate import PchipInterpolator  # the import takes half a second

    known = sorted(losses)
    return PchipInterpolator(known, [tuple(losses[each]) for each in known])(weights)


def slope(loss: float, dense: float, compressed: float) -> float:
    """Return the slope of log perplexity over loss, from the dense model to a compressed one."""
    return math.log(compressed / dense) / loss


def _estimate(losses: Mapping[float, Pair], dense: Pair, evaluated: Mapping[float, Pair], room: float) -> float:
    """Return the largest weight whose predicted general log perplexity is at most `room` above general-only
    calibration; at most the weight of the smallest domain loss."""
    start = losses[0.0][0]
    above = {weight: math.log(pair[0] / evaluated[0.0][0]) for weight, pair in evaluated.items()}
    kept = max(weight for weight in evaluated if above[weight] <= room)
    broken = min((weight for weight in evaluated if weight > kept), default=None)
    at_kept = float(losses_at(losses, [kept])[0, 0])
    weights = np.linspace(0.0, 1.0, 101)
    curves = losses_at(losses, weights)
    end = weights[curves[:, 1].argmin()]
    if broken is not None:
        share = (room - above[kept]) / (above[broken] - above[kept])
        most = at_kept + share * (float(losses_at(losses, [broken])[0, 0]) - at_kept)
    else:
        estimated = max(slope(start, dense[0], evaluated[0.0][0]), LEAST_SLOPE)
        measured = above[kept] / (at_kept - start) if at_kept > start else estimated
        most = start + room / max(measured, estimated / FLATTEST)
    allowed = weights[(curves[:, 0] <= most) & (weights <= end)]
    wanted = float(allowed.max(initial=0.0))
    if broken is not None:
        wanted = max(kept, min(wanted, broken - 2 * NEAR))  # slightly below, a weight may keep the bound
        if kept == 0.0:
            wanted = min(wanted, broken * room / above[broken] - NEAR / 4)
    elif kept > 0 and above[kept] <= room / 2:
        wanted = max(wanted, (kept + float(end)) / 2)
    return round(wanted, 2)


def _gain(
    losses: Mapping[float, Pair], dense: Pair, evaluated: Mapping[float, Pair], taken: float, wanted: float
) -> float:
    """Predicted decrease of log perplexity on the domain from the weight `taken` to `wanted`."""
    of_domain = slope(losses[0.0][1], dense[1], evaluated[0.0][1])
    at_taken, at_wanted = losses_at(losses, [taken, wanted])[:, 1]
    return of_domain * float(at_taken - at_wanted)
