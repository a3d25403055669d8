"""Uncertainty of a difference: over draws of the calibration windows, over test windows, and among many comparisons.

Two variants are measured on the same test windows, and for each draw calibrated on windows of the same seed. With
d[k, w] the difference of draw k and window w, there are two sources of uncertainty, which are kept separate:

* another draw of calibration text: the D means over windows, d[k, ·], are independent; their mean has the interval mean
  ± t(D − 1) · sd / √D. This is the noise of the method, and p-values refer to it.
* other test text: the W means over draws, d[·, w], have the standard error sd / √W. All draws share these windows, so
  more draws do not reduce it, and D · W is not a sample size.

With one draw only the second is available. Questions and documents of a task are treated like windows of a corpus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosscal.evaluation.summaries import added_errors, spread

CONFIDENCE = 0.95
DRAWS, WINDOWS, QUESTIONS, DOCUMENTS = "draws", "windows", "questions", "documents"


@dataclass(frozen=True)
class MeanEstimate:
    """A mean with its uncertainty."""

    mean: float
    sd: float | None
    """Standard deviation over draws; None for one."""
    stderr: float | None
    """Standard error of the mean over test windows or questions, for any number of draws."""
    over: str
    """What `interval` and `p` generalise over: `draws` if there are several, else `windows`, `questions` or
    `documents`."""
    interval: tuple[float, float] | None
    """95 % confidence interval; None if it cannot be estimated."""
    p: float | None
    """Two-sided p-value for a mean of zero."""
    draws: int
    items: int | None
    """Number of test windows or questions, if they were compared one by one."""


def over_draws_and_items(values_DW: Sequence[Sequence[float]], of: str = WINDOWS) -> MeanEstimate:
    """Return the mean of one value per draw and window or question: a difference, or one model's own value."""
    means = [math.fsum(row) / len(row) for row in values_DW]
    over_items = spread(math.fsum(column) / len(column) for column in zip(*values_DW, strict=True))
    stderr = None if over_items.sd is None else over_items.sd / math.sqrt(over_items.n)
    if len(means) > 1:
        return _over_draws(means, stderr, over_items.n)
    interval, p = _t(over_items.mean, stderr, over_items.n - 1)
    return MeanEstimate(over_items.mean, None, stderr, of, interval, p, 1, over_items.n)


def over_draws(values: Sequence[float], stderr: float | None, of: str) -> MeanEstimate:
    """Return the mean of one value per draw, whose standard error over windows or questions is known.

    With one draw the interval is that of a normal distribution.
    """
    if len(values) > 1:
        return _over_draws(values, stderr, None)
    interval, p = _t(values[0], stderr, None)
    return MeanEstimate(values[0], None, stderr, of, interval, p, 1, None)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple comparisons (Holm 1979): at level a the chance of any false finding is at
    most a, for any dependence. p(i) of m in rising order becomes max over j ≤ i of min(1, (m − j + 1) p(j))."""
    order = np.argsort(p_values, kind="stable")
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted


def _over_draws(values: Sequence[float], stderr: float | None, items: int | None) -> MeanEstimate:
    found = spread(values)
    assert found.sd is not None, "there are several draws"
    interval, p = _t(found.mean, found.sd / math.sqrt(found.n), found.n - 1)
    return MeanEstimate(found.mean, found.sd, stderr, DRAWS, interval, p, found.n, items)


def _t(mean: float, stderr: float | None, freedom: float | None) -> tuple[tuple[float, float] | None, float | None]:
    """Interval and p-value of Student's t; of the normal distribution if `freedom` is None."""
    from scipy.special import ndtr, ndtri, stdtr, stdtrit

    if stderr is None:
        return None, None
    if stderr == 0.0:
        return (mean, mean), float(mean == 0.0)
    upper, tail = (1 + CONFIDENCE) / 2, -abs(mean) / stderr
    half = float(ndtri(upper) if freedom is None else stdtrit(freedom, upper)) * stderr
    return (mean - half, mean + half), 2 * float(ndtr(tail) if freedom is None else stdtr(freedom, tail))


def over_both(found: MeanEstimate) -> tuple[float, float] | None:
    """Return the 95 % interval of a variant's own value over draws *and* test text, taken as independent.

    It is that of Student's t (see `added_errors`); an error over items whose number is not known counts as exact.
    """
    errors = []
    if found.stderr is not None:
        errors.append((found.stderr, found.items - 1 if found.items else math.inf))
    if found.sd is not None:
        errors.append((found.sd / math.sqrt(found.draws), found.draws - 1))
    return _t(found.mean, *added_errors(errors))[0] if errors else None
