"""Paired test of whether two models differ on a corpus: the only rule by which a model is chosen or published.

Both models are measured on the same n validation windows, because a hard window is hard for both. With d_i the log
perplexity of window i under the first model minus that under the second,

    mean = sum d_i / n,    stderr = sd(d) / sqrt(n),    margin = t(1 - LEVEL / (2 k), n - 1) stderr,

where t(p, f) is Student's quantile with f degrees of freedom and k is the number of comparisons behind one choice.

- Distinguishable: |mean| > margin. Otherwise the two are not distinguishable, which is a result and not a tie-break.
- Shown to be at most a fraction b worse: mean + margin <= log(1 + b). The burden of proof is on the claim: an estimate
  within the bound is rejected if its margin reaches beyond it, and so is a gain (b = 0) that may be chance.

Few windows: t grows from 2.0 at 64 windows to 2.4 at 8, 3.2 at 4 and 12.7 at 2, and one window shows nothing. Many
candidates: the best of many is also the luckiest. The level is therefore shared among the k comparisons (Bonferroni;
2.9 for ten candidates at 64 windows), which is valid for any dependence between candidates. If k candidates are
compared with one model, the chance of any false difference stays below LEVEL. If the lowest of k + 1 candidates is
searched and the k others are compared with it, the chance that the truly best is called worse stays below LEVEL
(multiple comparisons with the best, Hsu 1981). The rule is conservative for similar candidates, as in a sweep over
alpha.

Limits: windows cut from one long document count as independent, and a domain that is decided again with every version
gets a new chance of a false difference each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from crosscal.evaluation.summaries import PairedDifference, joined, paired_difference, same_draws

LEVEL = 0.05
"""Maximum probability that a choice rests on a difference that does not exist."""
Draws = Mapping[int | None, Sequence[float]]
"""Seed -> log perplexity of each window; the seed is None for a model that is the same for every draw."""


def log_difference(first: Draws, second: Draws) -> PairedDifference | None:
    """Return the mean difference of log perplexity, first - second, over the same windows, with its standard error.

    Only seeds that both have are compared. With several, a window counts with its mean over seeds, and the variance of
    the seeds' differences is added. None if no seed is common to both, the numbers of windows differ, or there are
    fewer than two.
    """
    pairs = list(same_draws(first, second))
    lengths = {len(nll) for pair in pairs for nll in pair}
    if len(lengths) != 1 or lengths <= {0, 1}:
        return None
    seeds = list(zip(*pairs, strict=True))
    over_windows = paired_difference(*([fmean(nll) for nll in zip(*each, strict=True)] for each in seeds))
    if len(pairs) == 1:
        return over_windows
    return joined(over_windows, paired_difference(*([fmean(nll) for nll in each] for each in seeds)))


def margin(difference: PairedDifference, comparisons: int = 1) -> float:
    """Return the half-width of the interval around the mean; infinite if the standard error is unknown."""
    from scipy.special import stdtrit

    if difference.stderr is None:
        return math.inf
    return float(stdtrit(difference.dof, 1 - LEVEL / (2 * max(1, comparisons)))) * difference.stderr


def is_distinguishable(difference: PairedDifference, comparisons: int = 1) -> bool:
    """Return whether the two models are distinguishable, in either direction."""
    return abs(difference.mean) > margin(difference, comparisons)


def excess(difference: PairedDifference, most: float, comparisons: int = 1) -> float:
    """Return mean + margin - log(1 + most): at most 0 if the first is shown to be at most the fraction `most` worse."""
    return difference.mean + margin(difference, comparisons) - math.log1p(most)


def change_text(difference: PairedDifference) -> str:
    """Format a mean difference of log perplexity as a change of perplexity: "better by 1.24 ± 0.31 %".

    The error of exp(mean) is exp(mean) · stderr, by the delta method; it is shown with two digits.
    """
    change = 100 * math.expm1(difference.mean)
    word = "better" if change < 0 else "worse"
    if difference.stderr is None:
        return f"{word} by {abs(change):.2g} %"
    error = 100 * math.exp(difference.mean) * difference.stderr
    decimals = min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 2
    return f"{word} by {abs(change):.{decimals}f} ± {error:.{decimals}f} %"
