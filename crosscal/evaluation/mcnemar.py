"""McNemar's exact test of whether two models differ on the same questions.

Questions that both models answer correctly, or both wrongly, carry no information about a difference. Of the
n = lost + won others, half are expected either way if the models are equal: p = P(|X − n/2| ≥ |won − n/2|) for X ~
Binomial(n, 1/2) (Edwards 1948's table, its exact form). A test based on the standard errors of the two accuracies would
count the questions that both share as noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AnswerChange:
    """Change from one model's answers to another's."""

    questions: int
    lost: int
    """Answered correctly by the first model only."""
    won: int
    """Answered correctly by the second model only."""

    @property
    def points(self) -> float:
        """Difference of accuracies, in percentage points."""
        return 100 * (self.won - self.lost) / self.questions

    @property
    def p(self) -> float:
        """Two-sided p-value; 1 if nothing changed."""
        return exact_p(self.lost, self.won)

    def __str__(self) -> str:
        """Format as "−4.2 points, 12 lost / 7 won, p = .36"."""
        told = "p < .001" if self.p < 0.001 else "p = 1" if self.p > 0.995 else f"p = {self.p:.2g}".replace("0.", ".")
        return f"{self.points:+.1f} points, {self.lost} lost / {self.won} won, {told}".replace("-", "−")


def change(before: Sequence[bool], after: Sequence[bool]) -> AnswerChange:
    """Compare answers to the same questions in the same order. Raises ValueError on unequal or no questions."""
    pairs = list(zip(before, after, strict=True))
    if not pairs:
        raise ValueError("no questions to compare on")
    return AnswerChange(len(pairs), sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))


def exact_p(lost: int, won: int) -> float:
    """Return min(1, 2 Σ_{k ≤ min(lost, won)} C(n, k) / 2ⁿ) with n = lost + won, in integers until the last division."""
    n, term, tail = lost + won, 1, 0
    for k in range(min(lost, won) + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # C(n, k + 1)
    return min(1.0, 2 * tail / 2**n)
