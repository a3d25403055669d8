"""Which candidate to take: the cheapest in general text of those that cannot be told from the best on a domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crosscal.evaluation.comparison import is_told_apart
from crosscal.evaluation.summaries import Difference, pareto_front


@dataclass(frozen=True)
class Choice:
    """What was chosen among numbered candidates, and among which."""

    chosen: int
    lowest: int
    """That of the lowest domain perplexity; `chosen` itself, or one that it cannot be told from."""
    front: tuple[int, ...]
    """Those that no other beats in both, by rising general perplexity."""
    alike: tuple[int, ...]
    """Of these all that cannot be told from `lowest`, itself included."""
    windows: int | None
    """Over which differences were paired; None where some could not be."""


def choose(
    points: Sequence[tuple[float, float]],
    difference: Callable[[int, int], Difference | None],
    slack: float = 0.0,
) -> Choice:
    """Of the candidates that no other beats in both, the lowest in general text of those that cannot be told from the
    lowest on the domain.

    `points`: (general, domain) perplexity of each. `difference(i, j)` is that of log perplexity on the domain; where
    it is None, a domain perplexity within `slack` of the lowest counts as alike.
    """
    front = pareto_front(points)
    lowest = min(front, key=lambda index: points[index][1])
    found = {index: difference(index, lowest) for index in front}
    comparisons = len(front) - 1

    def is_alike(index: int) -> bool:
        known = found[index]
        if known is None:
            return index == lowest or points[index][1] <= (1 + slack) * points[lowest][1]
        return not is_told_apart(known, comparisons)

    alike = tuple(index for index in front if is_alike(index))
    paired = [known.n for known in found.values() if known]
    windows = paired[0] if len(paired) == len(found) else None
    return Choice(min(alike, key=lambda index: points[index]), lowest, tuple(front), alike, windows)
