"""The named sums over tokens that methods may ask for, each with what distinguishes it: everything that adds, stores,
mixes or rescales sums goes by this table, so that a further one is a line here.

Shapes: T tokens, I inputs.
"""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor


class Statistic(StrEnum):
    """Sums over tokens x of a site's inputs. A step sees them as means per token, mixed over corpora."""

    degree: int
    """f(c x) = c^degree f(x) for c > 0."""
    is_matrix: bool
    """[I, I] instead of [I]."""

    def __new__(cls, value: str, degree: int, is_matrix: bool = False) -> Statistic:
        member = str.__new__(cls, value)
        member._value_ = value
        member.degree, member.is_matrix = degree, is_matrix
        return member

    GRAM = "gram", 2, True
    """Σ x xᵀ, the second moment: H."""
    SQUARE_SUM = "square_sum", 2
    """Σ x²: H's diagonal, at a thousandth of its cost."""
    ABS_SUM = "abs_sum", 1
    """Σ |x|."""
    SUM = "sum", 1
    """Σ x."""

    def divided(self, mean: Tensor, scale_I: Tensor) -> Tensor:
        """The statistic of x / s from that of x, s > 0: exact, being a moment."""
        return mean / (scale_I * scale_I[:, None] if self.is_matrix else scale_I**self.degree)

    def finite_part(self, sum_: Tensor) -> Tensor:
        """What is finite exactly where all of it is: Σ x² bounds every product sum (Cauchy-Schwarz)."""
        return sum_.diagonal() if self.is_matrix else sum_
