"""Gradient sums: squared gradients of the loss with respect to every weight of a site, summed over windows.

The loss of a window is its mean next-token cross-entropy, in nats per prediction, and g = ∂loss/∂W of one window. Σ g²
is the diagonal of the empirical Fisher matrix, with one gradient per window: tokens of one window depend on each other,
so their gradients are added before they are squared. Stored are sums and counts, never means: sets, shards and machines
merge by addition.

Shapes: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from crosscal.errors import NotFinite, StatisticsError
from crosscal.statistics.finite import all_finite


class Gradient(StrEnum):
    """Sums over windows of gradients with respect to each weight. A step sees them as means per window and layer, mixed
    over corpora like the statistics of inputs."""

    SQUARE = "grad_square"
    """Σ g²."""

    @property
    def degree(self) -> int:
        """f(c x) = c^degree f(x) if inputs are multiplied by c and everything behind the matrix is unchanged: the
        gradient of W is Σ δ xᵀ over tokens."""
        return 2

    def divided(self, mean_OI: Tensor, scale_I: Tensor) -> Tensor:
        """Return the statistic of W · s with inputs x / s from that of W: its gradient is that of W divided by s."""
        return mean_OI / scale_I**self.degree


@dataclass(frozen=True, eq=False)
class GradientSums:
    """Σ g² over windows of every matrix that reads one site."""

    squares: Mapping[str, Tensor]
    """Matrix -> Σ g² [O, I]."""
    windows: int
    weighted_windows: float | None = None
    """The sum of the windows' weights; None if every window has weight 1."""

    def __add__(self, other: GradientSums) -> GradientSums:
        """Return the sums over both sets of windows. Raises `StatisticsError` if the matrices differ."""
        shapes = [{name: tuple(each.shape) for name, each in sums.squares.items()} for sums in (self, other)]
        if shapes[0] != shapes[1]:
            raise StatisticsError("gradients of different sites cannot be added", got=f"{shapes[0]} and {shapes[1]}")
        return GradientSums(
            {name: mine_OI + other.squares[name] for name, mine_OI in self.squares.items()},
            self.windows + other.windows,
            None if self.weighted_windows is None is other.weighted_windows else self.mass + other.mass,
        )

    def weighted(self, weight: float) -> GradientSums:
        """Return the sums with every window counted `weight` times."""
        if weight == 1.0:
            return self
        squares = {name: square_OI * weight for name, square_OI in self.squares.items()}
        return GradientSums(squares, self.windows, self.mass * weight)

    @property
    def mass(self) -> float:
        """Denominator of the means: the sum of the windows' weights, their number if unweighted."""
        return self.windows if self.weighted_windows is None else self.weighted_windows

    def means(self, name: str = "site") -> dict[str, Tensor]:
        """Return E[g²] of every matrix. Raises `NotFinite`."""
        if not all(map(all_finite, self.squares.values())):
            raise NotFinite("the gradients were not finite", where=name, do="Calibrate in float32 or bfloat16.")
        return {matrix: square_OI / self.mass for matrix, square_OI in self.squares.items()}
