"""Whether two models differ on a corpus: the one rule by which anything is chosen or published.

Both are measured on the same n validation windows, for a hard window is hard for both. With d_i the log perplexity of
window i under the first model minus that under the second,

    mean = sum d_i / n,    stderr = sd(d) / sqrt(n),    margin = t(1 - LEVEL / (2 k), n - 1) stderr,

t(p, f) being Student's quantile with f degrees of freedom and k the number of comparisons that one choice rests on.

- Told apart: |mean| > margin. Otherwise the two are not distinguishable, which is an outcome and no tie-break.
- Shown to be at most a fraction b worse: mean + margin <= log(1 + b). Whoever claims has to show it: an estimate within
  the bound whose margin is not is refused, as is a gain (b = 0, told apart) that might be chance.

Few windows: t grows from 2.0 at 64 windows to 2.4 at 8, 3.2 at 4 and 12.7 at 2, and one window shows nothing. Many
candidates: the best of many is the luckiest of them as well. So the level is shared among the k comparisons
(Bonferroni; 2.9 for ten candidates at 64 windows), which holds whatever candidates have to do with each other. Of k
candidates compared with one model, the chance that any is called different that is not stays below LEVEL; of k + 1
among which the lowest is looked for and k compared with it, the chance that the truly best is called worse (multiple
comparisons with the best, Hsu 1981). It is cautious where candidates resemble each other, as in a sweep over alpha.

What the rule cannot see: windows cut from one long document count as independent, and a domain that is decided about
again with every version gets a new chance to be lucky each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from crosscal.evaluation.summaries import Difference, joined, paired_difference

LEVEL = 0.05
"""Most chance that a choice rests on a difference that is none."""


def log_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Difference | None:
    """Mean difference of log perplexity, first - second, over the same windows, and its standard error.

    Both hold the windows' log perplexities seed by seed. Of several seeds a window counts with their mean, and where
    both have as many, in pairs, the deviation of the seeds' differences adds to the error. None where the windows were
    not kept, are not the same, or are fewer than two.
    """
    lengths = {len(nll) for nll in (*first, *second)}
    if not first or not second or len(lengths) > 1 or lengths <= {0, 1}:
        return None
    over_windows = paired_difference(*([fmean(nll) for nll in zip(*seeds, strict=True)] for seeds in (first, second)))
    if len(first) == len(second) > 1:
        return joined(over_windows, paired_difference(list(map(fmean, first)), list(map(fmean, second))))
    return over_windows


def margin(difference: Difference, comparisons: int = 1) -> float:
    """How far the true mean may be from the one found; infinite where there is nothing to estimate it from."""
    from scipy.special import stdtrit

    if difference.stderr is None:
        return math.inf
    return float(stdtrit(difference.dof, 1 - LEVEL / (2 * max(1, comparisons)))) * difference.stderr


def is_told_apart(difference: Difference, comparisons: int = 1) -> bool:
    """Whether the two differ, in one direction or the other."""
    return abs(difference.mean) > margin(difference, comparisons)


def excess(difference: Difference, most: float, comparisons: int = 1) -> float:
    """By how much log perplexity is not shown to be at most the fraction `most` worse; at most 0 where it is shown."""
    return difference.mean + margin(difference, comparisons) - math.log1p(most)


def change_text(difference: Difference) -> str:
    """A mean difference of log perplexity as a change of perplexity: "better by 1.24 ± 0.31 %", to two digits of its
    standard error.

    The error of exp(mean) is exp(mean) · stderr, by the delta method.
    """
    change = 100 * math.expm1(difference.mean)
    word = "better" if change < 0 else "worse"
    if difference.stderr is None:
        return f"{word} by {abs(change):.2g} %"
    error = 100 * math.exp(difference.mean) * difference.stderr
    decimals = min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 2
    return f"{word} by {abs(change):.{decimals}f} ± {error:.{decimals}f} %"
