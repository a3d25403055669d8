"""The Hessians of one site: each set is read once, added to its corpus's sum and let go. Shapes: I inputs.

So what is held does not grow with the sets (shards) that a corpus consists of: a matrix for each corpus, seed and split
that some group mixes, and the one being read. Mixtures of corpora are made from the sums, one for each group being
solved; corpora, not sets, are brought to one trace where a variant asks for that.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

from torch import Tensor

from crosscal.models.sites import Site
from crosscal.stages.block_problem import BlockProblem, Group
from crosscal.statistics import HessianSum

Place = tuple[str, int, bool]
"""(corpus, seed, whether held out)."""


class SiteHessians:
    """Of one site for several groups, whichever lane asks first; let go after the last group."""

    def __init__(self, problem: BlockProblem, site: Site, groups: Sequence[Group], also: Sequence[Group] = ()) -> None:
        """`also`: further mixtures that steps of recipes see."""
        mixed = (*groups, *also)
        self._problem, self._where = problem, f"{problem.name}.{site.name}"
        self._read = functools.partial(problem.cached.read, block=problem.block, site=site)
        self._corpora = sorted({(corpus, group.seed) for group in mixed for corpus in group.mixture.corpora})
        self._groups, self._lock = len(groups), threading.Lock()
        self._sums: dict[Place, HessianSum] | None = None

    def __call__(self, group: Group, *, held_out: bool = False) -> tuple[Tensor, int]:
        """A group's Hessian, on the device, and the tokens behind it.

        Raises `EmptyStatistics`, `NotFinite`, and what reading the store raises.
        """
        with self._lock:
            if self._sums is None:
                self._sums = self._summed()
            sums = {corpus: self._sums[corpus, group.seed, held_out] for corpus in group.mixture.corpora}
        hessians = {corpus: each.hessian_II(f"{self._where} ({corpus})") for corpus, each in sums.items()}
        hessian_II = group.mixture.mix(hessians, trace_normalised=group.trace_normalised)
        return hessian_II.to(self._problem.device), sum(each.tokens for each in sums.values())

    def group_is_done(self) -> None:
        """To be called once by each group; after the last nothing is held."""
        with self._lock:
            self._groups -= 1
            if not self._groups:
                self._sums = None

    def _summed(self) -> dict[Place, HessianSum]:
        """Every set once, in an order that does not depend on which groups are solved: sums keep their bits."""
        sums: dict[Place, HessianSum] = {}
        wanted: dict[str, list[tuple[HessianSum, float]]] = {}
        for corpus, seed in self._corpora:
            for held_out in (False, True):
                total = sums[corpus, seed, held_out] = HessianSum()
                sample = self._problem.samples[corpus, seed]
                for part in (sample.held_out if held_out else sample.calibration).parts:
                    wanted.setdefault(part.key, []).append((total, part.weight))
        for key in sorted(wanted):
            moments = self._read(key)
            for total, weight in wanted[key]:
                total.add(moments, weight)
            del moments  # before the next one is read
        for total in sums.values():
            total.finish()
        return sums
