"""The weight of a domain that is best for it and keeps general perplexity within a bound, at few models evaluated.

Log perplexity is taken for a function of the mean relative loss E on the same corpus. Where it begins is known from
general-only calibration, and its slope is estimated from there to the dense model, of loss 0. That is steeper than the
slope between mixtures (measured: twice as steep on one model, on another the perplexity first falls), so the first
weight is a safe one, and what is measured there corrects the slope for the next: a secant from general-only, or half
of the way that is left where less than half of the bound was used; or, between one that keeps the rule and one that
breaks it, the straight line between the two, which lies above a curve that bends upwards. As long as only general-only
keeps it, that line is drawn over the weight as well, and the smaller answer taken: measured, E may not rise at all up
to a weight where perplexity has risen by 4 %. What is taken in the end was measured to keep the rule, if need be
general-only itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

MOST_EVALUATED = 3
"""Besides the dense model and general-only calibration."""
FLATTEST = 4.0
"""A measured slope counts as no flatter than a fourth of the estimate: else one flat stretch would ask for all."""
LEAST_SLOPE = 1e-12
"""Where general-only calibration is no worse than the dense model."""
NEAR = 0.02
"""Weights that differ by less are not evaluated again."""
LEAST_GAIN = 0.001
"""Of log perplexity on the domain: what gains less is not worth an evaluation."""

Pair = Sequence[float]
"""(general, domain)."""


def next_weight(
    losses: Mapping[float, Pair], dense: Pair, evaluated: Mapping[float, Pair], within: float
) -> float | None:
    """What to evaluate next; None once nothing is to be gained.

    `losses`: weight -> mean relative losses, 0 and 1 among them; `dense`: perplexities; `evaluated`: weight ->
    perplexities, all on validation windows.
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
    """Of those evaluated that keep the rule, that of the lowest perplexity on the domain; 0 always keeps it."""
    most = evaluated[0.0][0] * (1.0 + within)
    kept = [weight for weight in sorted(evaluated) if weight == 0.0 or evaluated[weight][0] <= most]
    return min(kept, key=lambda weight: evaluated[weight][1])


def losses_at(losses: Mapping[float, Pair], weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """[weights, (general, domain)] between weights that were solved: cubic, monotone where they are."""
    from scipy.interpolate import PchipInterpolator  # half a second

    known = sorted(losses)
    return PchipInterpolator(known, [tuple(losses[each]) for each in known])(weights)


def slope(loss: float, dense: float, compressed: float) -> float:
    """Of log perplexity over loss, from the dense model to a compressed one."""
    return math.log(compressed / dense) / loss


def _estimate(losses: Mapping[float, Pair], dense: Pair, evaluated: Mapping[float, Pair], room: float) -> float:
    """The largest weight whose loss on general text leaves log perplexity within `room` above general-only's, by what
    is known of the slope; no larger than where the domain's loss is smallest."""
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
        wanted = max(kept, min(wanted, broken - 2 * NEAR))  # beside one that breaks it by little is one that keeps it
        if kept == 0.0:
            wanted = min(wanted, broken * room / above[broken] - NEAR / 4)
    elif kept > 0 and above[kept] <= room / 2:
        wanted = max(wanted, (kept + float(end)) / 2)
    return round(wanted, 2)


def _gain(
    losses: Mapping[float, Pair], dense: Pair, evaluated: Mapping[float, Pair], taken: float, wanted: float
) -> float:
    """By how much log perplexity on the domain may be lower at a weight than at the one taken so far."""
    of_domain = slope(losses[0.0][1], dense[1], evaluated[0.0][1])
    at_taken, at_wanted = losses_at(losses, [taken, wanted])[:, 1]
    return of_domain * float(at_taken - at_wanted)
