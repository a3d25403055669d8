"""Whether two variants differ on a corpus: window by window, for a hard window is hard for both."""

from __future__ import annotations

import math
from statistics import fmean

from crosscal.evaluation.summaries import Difference, paired_difference
from crosscal.report.groups import Group

STANDARD_ERRORS = 2.0
"""A mean difference of no more than so many is not told from none."""


def log_difference(first: Group, second: Group, corpus: str, split: str) -> Difference | None:
    """Mean difference of log perplexity, first - second, over the same windows, and its standard error.

    Of several seeds a window counts with their mean, and where both have the same number of seeds, in pairs, the
    deviation of the seeds' differences adds to the error: var = var_windows / windows + var_seeds / seeds. None where
    the windows were not kept, or are fewer than two.
    """
    one, other = (list(group.window_nll.get((corpus, split), {}).values()) for group in (first, second))
    lengths = {len(nll) for nll in (*one, *other)}
    if not one or not other or len(lengths) > 1 or lengths <= {0, 1}:
        return None
    over_windows = paired_difference(*([fmean(nll) for nll in zip(*seeds, strict=True)] for seeds in (one, other)))
    errors = [over_windows.stderr or 0.0]
    if len(one) == len(other) > 1:
        errors.append(paired_difference(list(map(fmean, one)), list(map(fmean, other))).stderr or 0.0)
    return Difference(over_windows.mean, math.hypot(*errors), over_windows.n)


def is_told_apart(difference: Difference) -> bool:
    return abs(difference.mean) > STANDARD_ERRORS * (difference.stderr or 0.0)
