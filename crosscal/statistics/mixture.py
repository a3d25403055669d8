"""Cross-calibration: one Hessian out of several corpora.

`HessianSum` adds up the sets that stand for one corpus, `Mixture` weighs corpora against each other.

Source: arXiv 2502.18424 (cross-calibration, later MixCal) combines a general and an in-domain Hessian through one
regularisation parameter. The working form here, H = Σ_k w_k · gram_k / tokens_k with Σ w_k = 1, is our reading of it:
weights act per token, so that a corpus's size does not decide its say.

Shapes: I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.errors import StatisticsError, UsageError
from crosscal.statistics.moments import InputMoments, check_second_moment


@dataclass(frozen=True)
class Mixture:
    """Weights over corpora, positive and summing to 1; corpora of weight 0 are left out. Made by `of` or `alpha`."""

    weights: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Mixture:
        """Raises `UsageError` for a negative weight or a sum other than 1."""
        total = sum(weights.values())
        if any(not w >= 0 for w in weights.values()) or not math.isclose(total, 1.0, abs_tol=1e-6):
            raise UsageError(
                "mixture weights must be at least 0 and sum to 1",
                got=str(dict(weights)),
                do="For example {general: 0.5, legal: 0.5}.",
            )
        return cls(tuple(sorted((name, float(w)) for name, w in weights.items() if w > 0)))

    @classmethod
    def alpha(cls, domain: str, alpha: float, general: str = "general") -> Mixture:
        """(1 - alpha) general + alpha domain. Raises `UsageError` for an alpha outside 0 to 1."""
        return cls.of({general: 1.0 - alpha, domain: alpha} if domain != general else {general: 1.0})

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(name for name, _ in self.weights)

    def as_dict(self) -> dict[str, float]:
        return dict(self.weights)

    def hessian_II(
        self, moments: Mapping[str, InputMoments], *, trace_normalised: bool = False, name: str = "mixture"
    ) -> Tensor:
        """As `mix`, of H_k = gram_k / mass_k; `{general: 1}` is the general Hessian bit for bit.

        Besides the moments one matrix is held. Raises `StatisticsError` when a corpus's moments are missing or of
        another width, `EmptyStatistics`, `NotFinite`.
        """
        self._check(moments, name)
        for corpus in self.corpora:
            moments[corpus].check(f"{name} ({corpus})")
        if len(self.weights) == 1:
            return moments[self.corpora[0]].hessian_II(name)
        grams = {corpus: moments[corpus].gram_II for corpus in self.corpora}
        return self._sum(grams, {corpus: moments[corpus].mass for corpus in self.corpora}, trace_normalised)

    def mix(self, hessians: Mapping[str, Tensor], *, trace_normalised: bool = False) -> Tensor:
        """H = Σ_k w_k H_k of each corpus's Hessian; of a single corpus its own matrix, not a copy.

        `trace_normalised` scales every H_k to the weighted mean of their traces first, so that no corpus dominates a
        site by the scale of its activations; the trace of the mixture stays what it was.
        """
        if len(self.weights) == 1:
            return hessians[self.corpora[0]]
        return self._sum(hessians, dict.fromkeys(self.corpora, 1.0), trace_normalised)

    def _sum(self, grams: Mapping[str, Tensor], masses: Mapping[str, float], trace_normalised: bool) -> Tensor:
        traces = {corpus: float(grams[corpus].diagonal().sum()) / masses[corpus] for corpus in self.corpora}
        mean_trace = sum(weight * traces[corpus] for corpus, weight in self.weights)
        mixed_II = torch.zeros_like(grams[self.corpora[0]])
        for corpus, weight in self.weights:
            scale = mean_trace / traces[corpus] if trace_normalised and traces[corpus] > 0 else 1.0
            mixed_II.add_(grams[corpus], alpha=weight * scale / masses[corpus])
        return mixed_II

    def _check(self, moments: Mapping[str, InputMoments], name: str) -> None:
        missing = [corpus for corpus in self.corpora if corpus not in moments]
        if missing:
            raise StatisticsError("moments are missing", where=name, got=f"no {', '.join(missing)}")
        widths = {corpus: moments[corpus].inputs for corpus in self.corpora}
        if len(set(widths.values())) > 1:
            raise StatisticsError("moments of different sites cannot be mixed", where=name, got=f"inputs {widths}")

    def mean_abs_I(self, moments: Mapping[str, InputMoments]) -> Tensor:
        """Σ_k w_k · mean |x| over corpus k."""
        return torch.stack([moments[corpus].mean_abs_I * weight for corpus, weight in self.weights]).sum(0)


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
