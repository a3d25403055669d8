"""Which models leave a race over validation windows: those clearly worse than another on every corpus.

All are measured on the same few windows of each corpus, then those that remain on as many again, and so on: so many
*looks*. At each, a model leaves if there is another such that on every corpus

    mean > t(1 - LEVEL / (2 k), n - 1) stderr,    k = (models - 1) looks,

of the paired differences of log perplexity (see `crosscal.evaluation.comparison`). k counts all models that began, not
those that remain, and every look. A model that is not truly worse than any other on every corpus, so each one of the
front of the trade-off, leaves only where one of k comparisons misleads: with a chance below LEVEL / 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crosscal.evaluation.comparison import change_text, log_difference, margin
from crosscal.evaluation.summaries import Difference

FEWEST = 4
"""Windows of a corpus at the first look: Student's t has heavy tails below."""
Seeds = Sequence[Sequence[float]]
"""Of each seed, the log perplexity of each window."""


@dataclass(frozen=True)
class Beaten:
    by: str
    differences: dict[str, Difference]
    """Corpus -> how much worse, in log perplexity."""

    @property
    def text(self) -> str:
        changes = ", ".join(f"{corpus} {change_text(one)}" for corpus, one in self.differences.items())
        return f"clearly worse than {self.by} on every corpus ({changes})"


def looks(windows: int) -> list[list[int]]:
    """Numbers of the windows that are new at each of three looks: every fourth, every second, all; each spread over
    the whole text. Where that were too few, they come with the look before; later looks then have none."""
    parts = [list(range(0, windows, 4)), list(range(2, windows, 4)), list(range(1, windows, 2))]
    while len(parts[0]) < FEWEST and any(parts[1:]):
        following = next(number for number, part in enumerate(parts) if number and part)
        parts[0], parts[following] = sorted(parts[0] + parts[following]), []
    return parts


def beaten(windows: Mapping[str, Mapping[str, Seeds]], comparisons: int) -> dict[str, Beaten]:
    """Model -> the one that beats it clearly; `windows`: model -> corpus -> what was measured, of all on the same."""
    found: dict[str, Beaten] = {}
    for name, own in windows.items():
        others = {other: _differences(own, each) for other, each in windows.items() if other != name}
        better = {
            other: differences
            for other, differences in others.items()
            if differences and all(one.mean > margin(one, comparisons) for one in differences.values())
        }
        if better:
            other = max(better, key=lambda other: sum(one.mean for one in better[other].values()))
            found[name] = Beaten(other, better[other])
    return found


def _differences(own: Mapping[str, Seeds], other: Mapping[str, Seeds]) -> dict[str, Difference]:
    """Empty where some corpus cannot be compared: then nobody is beaten."""
    found = {corpus: log_difference(own[corpus], other[corpus]) for corpus in own if corpus in other}
    known = {corpus: one for corpus, one in found.items() if one is not None}
    return known if len(known) == len(own) == len(other) else {}
