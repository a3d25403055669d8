"""The sums over tokens that methods may request, with their properties. All code that adds, stores, mixes or rescales
sums uses this table, so a new sum takes one line here.

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
    """Function of a number that is summed; None if products of two inputs are summed, in a matrix [I, I]."""
    stored_in: str
    """The artifact that holds it. The small sums share one: together they take 0.1 to 4 % of the time of Σ x xᵀ, and a
    millionth of its bytes, while writing one artifact takes as long as writing a hundred of them."""

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
    """Σ (x_dense - x)(x_dense - x)ᵀ: also needed for losses against the dense model's outputs; summed directly, without
    the cancellation of a difference of large sums. Always summed with `cross`."""

    @property
    def is_matrix(self) -> bool:
        return self.of_each is None

    @property
    def is_symmetric(self) -> bool:
        return self is not Statistic.CROSS

    def divided(self, mean: Tensor, scale_I: Tensor) -> Tensor:
        """Return the statistic of x / s, computed exactly from that of x, s > 0."""
        return mean / (scale_I * scale_I[:, None] if self.is_matrix else scale_I**self.degree)

    def zeros(self, inputs: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The sum over no tokens."""
        return torch.zeros((inputs, inputs) if self.is_matrix else (inputs,), dtype=dtype, device=device)

    def finite_part(self, sum_: Tensor) -> Tensor:
        """Return a part that is finite if and only if the whole is: the diagonal, since Σ x² bounds every product sum
        (Cauchy-Schwarz); all of `cross`, whose products are of two different inputs."""
        return sum_.diagonal() if self.is_matrix and self.is_symmetric else sum_


VECTORS = tuple(which for which in Statistic if not which.is_matrix)
"""The small ones: a calibration pass always sums them."""
OF_TWO_STREAMS = frozenset({Statistic.CROSS, Statistic.DRIFT})
"""Those that need a dense stream of hidden states beside the compressed one (`upstream: sequential`)."""
EVERY = frozenset(Statistic) - OF_TWO_STREAMS
"""Those of one stream: all that a calibration pass over the dense model can sum."""


def streams_of(wanted: Collection[Statistic]) -> int:
    """Return the number of streams of hidden states that a calibration pass needs for these."""
    return 1 if OF_TWO_STREAMS.isdisjoint(wanted) else 2
