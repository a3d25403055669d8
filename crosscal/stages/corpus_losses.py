"""Losses of solved matrices on each corpus's own held-out text, whatever mixture of corpora they were solved on.

    relative loss on corpus k = tr(D H_k Dᵀ) / tr(W H_k Wᵀ),   D = W - V, H_k = E[x xᵀ] over held-out windows of k

They are comparable between mixtures. The loss on a solution's own mixture is not: its Hessian differs per mixture.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from crosscal.compressors import LayerProblem, LayerSolution, Need, Statistic, Statistics, quadratic_loss
from crosscal.compressors.problem import output_loss
from crosscal.errors import EmptyStatistics
from crosscal.stages.block_problem import HessianGroup, SiteStatistics
from crosscal.statistics import Mixture

Measure = Callable[[LayerProblem, LayerSolution], dict[str, float]]
"""(matrix, its solution) -> corpus -> relative loss."""
LOSSES_TAKE = frozenset({Statistic.GRAM, Statistic.SUM})


def of_corpora(
    corpora: Sequence[str], groups: Mapping[HessianGroup, frozenset[Need]]
) -> dict[HessianGroup, frozenset[Need]]:
    """Return what losses on each corpus alone need, in addition to the `groups` of one solve: H, and the mean input if
    some step changes biases."""
    measured = (frozenset[Need]().union(*groups.values()) | {Statistic.GRAM}) & LOSSES_TAKE
    seeds = dict.fromkeys(group.seed for group in groups)
    return {alone(corpus, seed): measured for seed in seeds for corpus in corpora}


def alone(corpus: str, seed: int) -> HessianGroup:
    """Return the group of one corpus alone."""
    return HessianGroup(Mixture.of({corpus: 1.0}), seed, trace_normalised=False)


class CorpusLosses:
    """Losses of one site's matrices on some corpora; thread-safe, with cached output energies tr(W H Wᵀ)."""

    def __init__(self, statistics: SiteStatistics, corpora: Iterable[str]) -> None:
        self._statistics, self._corpora = statistics, tuple(corpora)
        self._lock = threading.Lock()
        self._energies: dict[tuple[HessianGroup, str], float] = {}

    def of_draw(self, seed: int) -> Measure:
        """Return a function that measures solutions on the held-out windows of one seed."""
        held_out = dict(self._held_out(seed))
        return lambda layer, solution: {
            group.mixture.corpora[0]: loss
            for group, statistics in held_out.items()
            if (loss := self._loss(group, statistics, layer, solution)) is not None
        }

    def _held_out(self, seed: int) -> Iterator[tuple[HessianGroup, Statistics]]:
        """Yield the statistics of every corpus with held-out tokens at this site: an expert may have none."""
        for corpus in self._corpora:
            group = alone(corpus, seed)
            try:
                yield group, self._statistics(group, held_out=True)[0]
            except EmptyStatistics:
                continue

    def _loss(
        self, group: HessianGroup, statistics: Statistics, layer: LayerProblem, solution: LayerSolution
    ) -> float | None:
        """Return the relative loss; None if the dense matrix's output energy is zero, as the ratio is undefined."""
        energy = self._energy(group, statistics, layer)
        if energy <= 0:
            return None
        difference_OI, mean_I = layer.weight_OI - solution.weight_OI, statistics.get(Statistic.SUM)
        loss = output_loss(difference_OI, statistics.hessian_II, solution.bias_change_O, mean_I)
        return max(0.0, loss) / energy  # negative only by roundoff

    def _energy(self, group: HessianGroup, statistics: Statistics, layer: LayerProblem) -> float:
        with self._lock:
            known = self._energies.get((group, layer.name))
        if known is None:
            known = quadratic_loss(layer.weight_OI, statistics.hessian_II)
            with self._lock:
                self._energies[group, layer.name] = known
        return known
