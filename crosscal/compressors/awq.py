"""AWQ: scale up the weights of large inputs and divide these inputs, which lowers the error of rounding.

    s_j = mean|x_j|^r,  r = k / points,  normalised to s / √(max s · min s)

r minimises the loss of rounding W · diag s to nearest, Σ tr((W - Q / s) H (W - Q / s)ᵀ) over the matrices of a site,
which is their output error on the calibration tokens. This step rounds nothing: followed by `rtn` it is the published
method, and any other method may follow instead. The norm that produces the input absorbs 1/s; a site without one (the
inputs of the last matrices of attention and of the feed-forward part, experts) stays unchanged.

Lin et al. 2023, arXiv 2306.00978. Not implemented: scales of v and o and of up and down, the search for clipped ranges,
asymmetric grids. The published search measures the error behind attention or the feed-forward part, not each matrix.

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
"""Lower bound of a scale before normalisation."""


@dataclass(frozen=True)
class AWQ:
    bits: int
    """2 to 8: bits of the rounding that the scales are optimised for."""
    group_size: int | None = 128
    """Inputs per scale of that rounding; None means one scale per row."""
    points: int = 20
    """Number of exponents r that are tried; the first is 0, which changes nothing."""

    kind: ClassVar = "transform"
    needs: ClassVar = frozenset({Statistic.ABS_SUM, Statistic.GRAM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)
        if self.points < 1:
            raise UsageError("points are 1 or more", got=str(self.points))

    def __call__(self, site: Site) -> Site:
        """Return the site with weights W · diag s and the same outputs; the smallest exponent among equal losses."""
        mean_abs_I = site.statistics[Statistic.ABS_SUM]
        wanted = (scales_I(mean_abs_I, point / self.points) for point in range(self.points))
        candidates = [near_I for scale_I in wanted if (near_I := site.nearest_I(scale_I)) is not None]
        if not candidates:
            return site
        return site.scaled(min(candidates, key=lambda scale_I: self._cost(site, scale_I)))

    def _cost(self, site: Site, scale_I: Tensor) -> float:
        """Loss of rounding to nearest at these scales, over all layers of the site."""
        rounded = RoundToNearest(self.bits, self.group_size)(site.scaled(scale_I))
        hessian_II = site.statistics.hessian_II
        pairs = zip(site.layers, rounded.layers, strict=True)
        return sum(quadratic_loss(old.target_OI - new.weight_OI / scale_I, hessian_II) for old, new in pairs)


def scales_I(mean_abs_I: Tensor, exponent: float) -> Tensor:
    """Return s of one exponent, normalised so that the product of its largest and smallest value is 1."""
    scale_I = mean_abs_I.pow(exponent).clamp_min(SMALLEST)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()
