"""Elimination race over validation windows: models leave that are clearly worse than another on every corpus.

All models are measured on the same few windows of each corpus, the remaining ones then on as many again, and so on;
each round is a *look*. At each look, a model leaves if there is another such that on every corpus

    mean > t(1 - LEVEL / (2 k), n - 1) stderr,    k = (models - 1) looks,

for the paired differences of log perplexity (see `crosscal.evaluation.comparison`). k counts all models at the start,
not only those that remain, and every look. A model that no other truly beats on every corpus, hence every model on the
Pareto front, leaves only if one of k comparisons is wrong: with a probability below LEVEL / 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crosscal.evaluation.comparison import Draws, change_text, log_difference, margin
from crosscal.evaluation.summaries import PairedDifference

FEWEST = 4
"""Minimum windows of a corpus at the first look: with fewer, Student's t has heavy tails."""


@dataclass(frozen=True)
class Eliminated:
    by: str
    differences: dict[str, PairedDifference]
    """Corpus -> difference of log perplexity; positive: the beaten model is worse."""

    @property
    def text(self) -> str:
        changes = ", ".join(f"{corpus} {change_text(one)}" for corpus, one in self.differences.items())
        return f"clearly worse than {self.by} on every corpus ({changes})"


def looks(windows: int) -> list[list[int]]:
    """Return the indices of the windows that are new at each of three looks: every fourth, every second, all; each look
    is spread over the whole text. If the first look has too few, later looks' windows join it; those are then empty."""
    parts = [list(range(0, windows, 4)), list(range(2, windows, 4)), list(range(1, windows, 2))]
    while len(parts[0]) < FEWEST and any(parts[1:]):
        following = next(number for number, part in enumerate(parts) if number and part)
        parts[0], parts[following] = sorted(parts[0] + parts[following]), []
    return parts


def beaten(windows: Mapping[str, Mapping[str, Draws]], comparisons: int) -> dict[str, Eliminated]:
    """Return model -> the one that beats it clearly. `windows`: model -> corpus -> values on the same windows."""
    found: dict[str, Eliminated] = {}
    for name, own in windows.items():
        others = {other: _differences(own, each) for other, each in windows.items() if other != name}
        better = {
            other: differences
            for other, differences in others.items()
            if differences and all(one.mean > margin(one, comparisons) for one in differences.values())
        }
        if better:
            other = max(better, key=lambda other: sum(one.mean for one in better[other].values()))
            found[name] = Eliminated(other, better[other])
    return found


def _differences(own: Mapping[str, Draws], other: Mapping[str, Draws]) -> dict[str, PairedDifference]:
    """Empty if some corpus cannot be compared; then the model is not beaten."""
    found = {corpus: log_difference(own[corpus], other[corpus]) for corpus in own if corpus in other}
    known = {corpus: one for corpus, one in found.items() if one is not None}
    return known if len(known) == len(own) == len(other) else {}
