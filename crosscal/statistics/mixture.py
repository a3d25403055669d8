"""Cross-calibration: mix the Hessians of several corpora, and every other statistic, by the same weights.

`MeanSum` adds up the sets of one corpus, `Mixture` weights corpora against each other.

Source: arXiv 2502.18424 (cross-calibration, later MixCal) combines a general and an in-domain Hessian through one
regularisation parameter. The working form here, H = Σ_k w_k · gram_k / tokens_k with Σ w_k = 1, is our interpretation:
weights act per token, so a corpus's size does not determine its influence.

Shapes: I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.errors import StatisticsError, UsageError
from crosscal.statistics.moments import InputMoments, check_sum
from crosscal.statistics.statistic import Statistic

Means = Mapping[Statistic, Tensor]
"""Means per token."""


@dataclass(frozen=True)
class Mixture:
    """Weights over corpora, positive and summing to 1; corpora of weight 0 are left out. Made by `of` or `alpha`."""

    weights: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Mixture:
        """Make a mixture of weights by corpus. Raises `UsageError` for a negative weight or a sum other than 1."""
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
        """Make (1 - alpha) general + alpha domain. Raises `UsageError` for an alpha outside 0 to 1.

        1 - alpha is the decimal that a user would write, where one exists: alpha 0.9 is {general: 0.1, domain: 0.9}.
        """
        rest, written = 1.0 - alpha, round(1.0 - alpha, 12)
        weights = {general: written if written + alpha == 1.0 else rest, domain: alpha}
        return cls.of(weights if domain != general else {general: 1.0})

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(name for name, _ in self.weights)

    def as_dict(self) -> dict[str, float]:
        return dict(self.weights)

    def hessian_II(
        self, moments: Mapping[str, InputMoments], *, trace_normalised: bool = False, name: str = "mixture"
    ) -> Tensor:
        """Mix the Hessians H_k = gram_k / mass_k as `mix` does; `{general: 1}` is the general Hessian bit for bit.

        Allocates one matrix besides the moments. Raises `StatisticsError` if a corpus's moments are missing or of
        another width, `EmptyStatistics`, `NotFinite`.
        """
        self._check(moments, name)
        for corpus in self.corpora:
            moments[corpus].check(f"{name} ({corpus})")
        if len(self.weights) == 1:
            return moments[self.corpora[0]].hessian_II(name)
        grams = {corpus: moments[corpus].gram_II for corpus in self.corpora}
        masses = {corpus: moments[corpus].mass for corpus in self.corpora}
        traces = {corpus: float(grams[corpus].diagonal().sum()) / masses[corpus] for corpus in self.corpora}
        scales = self._scales(traces if trace_normalised else None)
        return self._sum(grams, {corpus: weight * scales[corpus] / masses[corpus] for corpus, weight in self.weights})

    def mix(self, means: Mapping[str, Means], *, trace_normalised: bool = False) -> dict[Statistic, Tensor]:
        """Return m = Σ_k w_k m_k of every statistic of all corpora; of a single corpus its own tensors, not copies.

        `trace_normalised` first scales the corpora to one trace, so that none dominates a site by the scale of its
        activations: inputs of corpus k become √s_k x, s_k = (Σ_j w_j tr H_j) / tr H_k, which multiplies a statistic of
        degree d by s_k^(d/2). The trace of the mixture does not change. It needs E[x xᵀ] or E[x²].
        """
        traces = self.traces(means) if trace_normalised else None
        every = means[self.corpora[0]]
        return {which: self.mixed({c: means[c][which] for c in self.corpora}, which.degree, traces) for which in every}

    def mixed(self, parts: Mapping[str, Tensor], degree: int, traces: Mapping[str, float] | None = None) -> Tensor:
        """Mix one statistic of the given degree. `traces`: those of all corpora, to normalise by; None does not."""
        if len(self.weights) == 1:
            return parts[self.corpora[0]]
        scales = self._scales(traces)
        factors = {corpus: weight * scales[corpus] ** (degree / 2) for corpus, weight in self.weights}
        return self._sum(parts, factors)

    def traces(self, means: Mapping[str, Means]) -> dict[str, float]:
        """Return tr H_k of every corpus; empty for a single corpus, which is never normalised."""
        return {corpus: _trace(means[corpus]) for corpus in self.corpora} if len(self.weights) > 1 else {}

    def _scales(self, traces: Mapping[str, float] | None) -> dict[str, float]:
        """s_k of every corpus; 1 without traces."""
        if traces is None:
            return dict.fromkeys(self.corpora, 1.0)
        mean_trace = sum(weight * traces[corpus] for corpus, weight in self.weights)
        return {corpus: mean_trace / trace if trace > 0 else 1.0 for corpus, trace in traces.items()}

    def _sum(self, parts: Mapping[str, Tensor], factors: Mapping[str, float]) -> Tensor:
        mixed = torch.zeros_like(parts[self.corpora[0]])
        for corpus in self.corpora:
            mixed.add_(parts[corpus], alpha=factors[corpus])
        return mixed

    def _check(self, moments: Mapping[str, InputMoments], name: str) -> None:
        missing = [corpus for corpus in self.corpora if corpus not in moments]
        if missing:
            raise StatisticsError("moments are missing", where=name, got=f"no {', '.join(missing)}")
        widths = {corpus: moments[corpus].inputs for corpus in self.corpora}
        if len(set(widths.values())) > 1:
            raise StatisticsError("moments of different sites cannot be mixed", where=name, got=f"inputs {widths}")

    def mean_abs_I(self, moments: Mapping[str, InputMoments]) -> Tensor:
        """Return Σ_k w_k · mean |x| over corpus k, [I]."""
        return torch.stack([moments[corpus].mean_abs_I * weight for corpus, weight in self.weights]).sum(0)


def _trace(means: Means) -> float:
    """tr H = Σ_i E[x_i²]."""
    square_I = means.get(Statistic.SQUARE_SUM)
    return float((means[Statistic.GRAM].diagonal() if square_I is None else square_I).sum())


class MeanSum:
    """Running means Σ_k w_k · sum_k / Σ_k w_k · mass_k of some statistics over the added sets, which are not kept.

    A set counts by the tokens that reached the site, so a set without tokens, as an expert may have, leaves its share
    to the others. The mean of a single set is bit-identical to that set's own.
    """

    def __init__(self, wanted: Collection[Statistic] = (Statistic.GRAM,)) -> None:
        self.tokens = 0
        self._wanted = sorted(wanted)
        self._sums: dict[Statistic, Tensor] = {}
        self._weights: list[float] = []
        self._masses: list[float] = []

    def add(self, moments: InputMoments, weight: float) -> None:
        """Add one set. Raises `StatisticsError` for moments of another width."""
        if moments.tokens == 0:
            return
        for which in self._wanted:
            self._add(which, moments[which], weight)
        self._weights.append(weight)
        self._masses.append(moments.mass)
        self.tokens += moments.tokens

    def _add(self, which: Statistic, sum_: Tensor, weight: float) -> None:
        if not self._masses:
            self._sums[which] = sum_.clone()
            return
        total = self._sums[which]
        if total.shape != sum_.shape:
            widths = f"{len(total)} and {len(sum_)} inputs"
            raise StatisticsError("moments of different sites cannot be mixed", got=widths)
        if len(self._masses) == 1:
            total.mul_(self._weights[0])
        total.add_(sum_, alpha=weight)

    def finish(self) -> None:
        """Turn the sums into means, once; nothing can be added afterwards."""
        weighted = sum(weight * mass for weight, mass in zip(self._weights, self._masses, strict=True))
        for total in self._sums.values():
            total.div_(self._masses[0] if len(self._masses) == 1 else weighted)

    def means(self, name: str = "site") -> dict[Statistic, Tensor]:
        """Return the means, after `finish`; do not modify them. Raises `EmptyStatistics`, `NotFinite`."""
        for which in self._wanted:
            check_sum(which, self._sums.get(which, torch.empty(0, 0)), self.tokens, name)
        return dict(self._sums)
