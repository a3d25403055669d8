"""Choose the lowest general perplexity among candidates not distinguishable from the best on a domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crosscal.evaluation.comparison import is_distinguishable
from crosscal.evaluation.summaries import PairedDifference, pareto_front


@dataclass(frozen=True)
class CandidateChoice:
    """The index of the chosen candidate, and the candidates it was chosen among."""

    chosen: int
    lowest: int
    """Candidate with the lowest domain perplexity: `chosen` itself, or one not distinguishable from it."""
    front: tuple[int, ...]
    """Pareto front of both perplexities, by rising general perplexity."""
    alike: tuple[int, ...]
    """Candidates on the front that are not distinguishable from `lowest`, itself included."""
    windows: int | None
    """Number of windows over which differences were paired; None if some could not be paired."""


def choose(
    points: Sequence[tuple[float, float]],
    difference: Callable[[int, int], PairedDifference | None],
    slack: float = 0.0,
) -> CandidateChoice:
    """Return the lowest general perplexity on the Pareto front among the candidates that are not distinguishable from
    the lowest domain perplexity.

    `points`: (general, domain) perplexity of each. `difference(i, j)`: difference of log perplexity on the domain; if
    it is None, a domain perplexity within `slack` of the lowest counts as not distinguishable.
    """
    front = pareto_front(points)
    lowest = min(front, key=lambda index: points[index][1])
    found = {index: difference(index, lowest) for index in front}
    comparisons = len(front) - 1

    def is_alike(index: int) -> bool:
        known = found[index]
        if known is None:
            return index == lowest or points[index][1] <= (1 + slack) * points[lowest][1]
        return not is_distinguishable(known, comparisons)

    alike = tuple(index for index in front if is_alike(index))
    paired = [known.n for known in found.values() if known]
    windows = paired[0] if len(paired) == len(found) else None
    return CandidateChoice(min(alike, key=lambda index: points[index]), lowest, tuple(front), alike, windows)
