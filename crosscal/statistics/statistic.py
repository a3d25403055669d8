"""The named sums over tokens that methods may ask for, each with what distinguishes it: everything that adds, stores,
mixes or rescales sums goes by this table, so that a further one is a line here.

Shapes: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor


class Statistic(StrEnum):
    """Sums over tokens x of a site's inputs. A step sees them as means per token, mixed over corpora."""

    degree: int
    """f(c x) = c^degree f(x) for c > 0."""
    of_each: Callable[[Tensor], Tensor] | None
    """What of a number is summed; None where products of two inputs are, in a matrix [I, I]."""
    stored_in: str
    """The artifact that holds it. The small sums stand in one: they take 0.1 to 4 % of the time of Σ x xᵀ together,
    and a millionth of its bytes, while every artifact takes as long to be on the disk as a hundred of them."""

    def __new__(cls, value: str, degree: int, of_each: Callable[[Tensor], Tensor] | None, stored_in: str) -> Statistic:
        member = str.__new__(cls, value)
        member._value_ = value
        member.degree, member.of_each, member.stored_in = degree, of_each, stored_in
        return member

    GRAM = "gram", 2, None, "gram"
    """Σ x xᵀ, the second moment: H."""
    SQUARE_SUM = "square_sum", 2, torch.square, "vectors"
    """Σ x²: H's diagonal, at a thousandth of its cost."""
    ABS_SUM = "abs_sum", 1, torch.abs, "vectors"
    """Σ |x|."""
    SUM = "sum", 1, torch.positive, "vectors"
    """Σ x."""

    @property
    def is_matrix(self) -> bool:
        return self.of_each is None

    def divided(self, mean: Tensor, scale_I: Tensor) -> Tensor:
        """The statistic of x / s from that of x, s > 0: exact, being a moment."""
        return mean / (scale_I * scale_I[:, None] if self.is_matrix else scale_I**self.degree)

    def zeros(self, inputs: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The sum over no tokens."""
        return torch.zeros((inputs, inputs) if self.is_matrix else (inputs,), dtype=dtype, device=device)

    def finite_part(self, sum_: Tensor) -> Tensor:
        """What is finite exactly where all of it is: Σ x² bounds every product sum (Cauchy-Schwarz)."""
        return sum_.diagonal() if self.is_matrix else sum_


VECTORS = tuple(which for which in Statistic if not which.is_matrix)
"""Those that are small: a reading sums them in any case."""
EVERY = frozenset(Statistic)
