"""AWQ: multiply the weights of large inputs, divide the inputs, and round with less harm.

    s_j = mean|x_j|^r,  r = k / points,  s / √(max s · min s)

The r whose rounding to nearest of W · diag s costs least: Σ tr((W - Q / s) H (W - Q / s)ᵀ) over the matrices of a site,
which is their output error on the calibration tokens. Nothing is rounded here: `rtn` behind it is the published
method, and any other method may stand there instead. The norm that makes the input absorbs 1/s; a site without one (the
inputs of attention's and the feed-forward part's last matrices, experts) stays as it is.

Lin et al. 2023, arXiv 2306.00978. Left out of it: scales of v and o and of up and down, the search for clipped ranges,
asymmetric grids; the published search measures behind attention or the feed-forward part, not behind each matrix.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crosscal.compressors.grid import check_settings
from crosscal.compressors.problem import quadratic_loss
from crosscal.compressors.recipe import alone
from crosscal.compressors.rtn import RoundToNearest
from crosscal.compressors.state import Site, Statistic
from crosscal.errors import UsageError

SMALLEST = 1e-4
"""Scale, before they are brought to the middle."""


@dataclass(frozen=True)
class AWQ:
    bits: int
    """2 to 8: of the rounding that scales are chosen for."""
    group_size: int | None = 128
    """Inputs per scale of that rounding; None is one scale a row."""
    points: int = 20
    """Of the grid of exponents r; the first is 0, which changes nothing."""

    kind: ClassVar = "transform"
    needs: ClassVar = frozenset({Statistic.ABS_SUM, Statistic.GRAM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)
        if self.points < 1:
            raise UsageError("points are 1 or more", got=str(self.points))

    def __call__(self, site: Site) -> Site:
        """W · diag s; the same outputs. The first among equal exponents."""
        mean_abs_I = site.statistics[Statistic.ABS_SUM]
        wanted = (scales_I(mean_abs_I, point / self.points) for point in range(self.points))
        candidates = [near_I for scale_I in wanted if (near_I := site.nearest_I(scale_I)) is not None]
        if not candidates:
            return site
        return site.scaled(min(candidates, key=lambda scale_I: self._cost(site, scale_I)))

    def _cost(self, site: Site, scale_I: Tensor) -> float:
        """Of rounding to nearest at these scales."""
        rounded = RoundToNearest(self.bits, self.group_size)(site.scaled(scale_I))
        hessian_II = site.statistics.hessian_II
        pairs = zip(site.layers, rounded.layers, strict=True)
        return sum(quadratic_loss(old.target_OI - new.weight_OI / scale_I, hessian_II) for old, new in pairs)


def scales_I(mean_abs_I: Tensor, exponent: float) -> Tensor:
    """s of one exponent; the product of the largest and the smallest is 1."""
    scale_I = mean_abs_I.pow(exponent).clamp_min(SMALLEST)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()
