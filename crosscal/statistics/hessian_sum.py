"""One corpus's Hessian out of the sets that stand for it, added one at a time. Shapes: I inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscal.errors import StatisticsError
from crosscal.statistics.moments import InputMoments, check_second_moment


class HessianSum:
    """H = Σ_k w_k · gram_k / Σ_k w_k · mass_k over the sets that were added, of which none is kept.

    A set counts by the tokens that reached the site, so that one without, as an expert may have, leaves its part to the
    others. One set alone is its own Hessian, bit for bit.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum_II = torch.empty(0, 0)
        self._weights: list[float] = []
        self._masses: list[float] = []

    def add(self, moments: InputMoments, weight: float) -> None:
        """Raises `StatisticsError` for moments of another width."""
        if moments.tokens == 0:
            return
        if not self._masses:
            self._sum_II = moments.gram_II.clone()
        elif moments.inputs != len(self._sum_II):
            widths = f"{len(self._sum_II)} and {moments.inputs} inputs"
            raise StatisticsError("moments of different sites cannot be mixed", got=widths)
        else:
            if len(self._masses) == 1:
                self._sum_II.mul_(self._weights[0])
            self._sum_II.add_(moments.gram_II, alpha=weight)
        self._weights.append(weight)
        self._masses.append(moments.mass)
        self.tokens += moments.tokens

    def finish(self) -> None:
        """Make a mean of the sum, once; then nothing can be added any more."""
        if len(self._masses) == 1:
            self._sum_II.div_(self._masses[0])
        elif self._masses:
            self._sum_II.div_(sum(weight * mass for weight, mass in zip(self._weights, self._masses, strict=True)))

    def hessian_II(self, name: str = "hessian") -> Tensor:
        """After `finish`; not to be changed. Raises `EmptyStatistics`, `NotFinite`."""
        check_second_moment(self._sum_II, self.tokens, name)
        return self._sum_II
