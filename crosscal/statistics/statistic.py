"""The named sums over tokens that methods may ask for, each with what distinguishes it: everything that adds, stores,
mixes or rescales sums goes by this table, so that a further one is a line here.

Shapes: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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
    CROSS = "cross", 2, None, "cross"
    """Σ x_dense xᵀ: the same token in the dense model and behind compressed blocks. Not symmetric."""
    DRIFT = "drift", 2, None, "cross"
    """Σ (x_dense - x)(x_dense - x)ᵀ: what losses against the dense model's outputs take besides, free of the
    cancellation that a difference of large sums has. Comes along with `cross`."""

    @property
    def is_matrix(self) -> bool:
        return self.of_each is None

    @property
    def is_symmetric(self) -> bool:
        return self is not Statistic.CROSS

    def divided(self, mean: Tensor, scale_I: Tensor) -> Tensor:
        """The statistic of x / s from that of x, s > 0: exact, being a moment."""
        return mean / (scale_I * scale_I[:, None] if self.is_matrix else scale_I**self.degree)

    def zeros(self, inputs: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The sum over no tokens."""
        return torch.zeros((inputs, inputs) if self.is_matrix else (inputs,), dtype=dtype, device=device)

    def finite_part(self, sum_: Tensor) -> Tensor:
        """What is finite exactly where all of it is: Σ x² bounds every product sum (Cauchy-Schwarz), but of products of
        two different inputs the diagonal says nothing."""
        return sum_.diagonal() if self.is_matrix and self.is_symmetric else sum_


VECTORS = tuple(which for which in Statistic if not which.is_matrix)
"""Those that are small: a reading sums them in any case."""
OF_TWO_STREAMS = frozenset({Statistic.CROSS, Statistic.DRIFT})
"""Those that take a dense stream of hidden states beside the compressed one, in a walk with sequential upstream."""
EVERY = frozenset(Statistic) - OF_TWO_STREAMS
"""Of one stream: all that a reading of the dense model can sum."""


def streams_of(wanted: Collection[Statistic]) -> int:
    """How many streams of hidden states a walk holds for these."""
    return 1 if OF_TWO_STREAMS.isdisjoint(wanted) else 2
