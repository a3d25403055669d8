"""A block to solve: its weights, the grouping of variants by Hessian, and its sites' statistics and output energies.

Each calibration set of a site is read once, added to its corpus's sum and freed. Memory therefore does not grow with
the number of sets (shards) of a corpus: it holds one matrix per corpus, seed and split that some group mixes, and the
one being read. Mixtures are computed from these sums, one per group being solved. Trace normalisation, where a variant
asks for it, scales corpora, not sets.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crosscal.compressors import COMPRESSORS, Need, Recipe, SparsitiesOf, Statistics, allotted
from crosscal.models.sites import LeftDense, MatrixRef, Site
from crosscal.stages.gradients import Gradients
from crosscal.stages.moments import DENSE, CachedMoments
from crosscal.stages.sample import Sample
from crosscal.statistics import OF_TWO_STREAMS, VECTORS, Gradient, MeanSum, Mixture, Statistic, streams_of
from crosscal.store import digest_of
from crosscal.variants import Variant

ENERGIES = "energies"
ENERGIES_FILE = "energies.json"
ENERGIES_FORMAT = 1  # bump when something else is computed

MEASURED = frozenset({Statistic.GRAM, Statistic.SUM}) | OF_TWO_STREAMS
"""The statistics that losses are computed from."""
Place = tuple[str, int, bool]
"""(corpus, seed, whether held out)."""


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """One block to solve: its weights and where its statistics are."""

    name: str
    block: int
    sites: tuple[Site, ...]
    left_dense: tuple[LeftDense, ...]
    parameters: Mapping[str, Tensor]
    """As the checkpoint stores them."""
    cached: CachedMoments
    samples: Mapping[tuple[str, int], Sample]
    """(corpus, seed) -> its windows."""
    reference: Mixture
    """The mixture on which the loss of methods that need no data is measured."""
    device: str
    sparsities: Mapping[str, SparsitiesOf] = field(default_factory=dict)
    """Variant name -> allotted sparsities; variants with an allocator only."""
    gradients: Gradients | None = None
    """None if no step needs them."""
    measured_on: tuple[str, ...] = ()
    """Corpora on whose own held-out text solutions are measured, whatever mixture they were solved on."""
    why_dense: Callable[[str], str] = lambda parameter: ""
    """Full parameter name -> why its integers cannot be stored packed; empty if they can."""

    def recipe(self, variant: Variant, site: Site) -> Recipe:
        """Return the variant's steps, with the sparsities allotted to the matrices of a site."""
        if variant.allocator is None:
            return variant.steps
        layers = [f"{self.name}.{matrix.name}" for matrix in site.matrices]
        return allotted(variant.steps, self.sparsities[variant.name], layers)

    @property
    def always_mixed(self) -> frozenset[Statistic]:
        """The statistic mixed for every group: H, to measure losses. If no step of the run needs H, it is not summed
        and no loss is measured; then its diagonal, to find dead inputs."""
        return frozenset({Statistic.GRAM if self.cached.measures_losses else Statistic.SQUARE_SUM})

    def stored_dtype(self, matrix: MatrixRef) -> torch.dtype:
        """Return the dtype in which the checkpoint stores a matrix."""
        return self.parameters[matrix.parameter].dtype


@dataclass(frozen=True)
class HessianGroup:
    """What determines a Hessian; variants of one group share it."""

    mixture: Mixture
    seed: int
    trace_normalised: bool

    def on(self, mixture: Mixture) -> HessianGroup:
        """Return the group with another mixture, for a step that has its own."""
        return dataclasses.replace(self, mixture=mixture)


def grouped(problem: BlockProblem, variants: Iterable[Variant]) -> dict[HessianGroup, list[Variant]]:
    """Return the variants by the Hessian that they share."""
    groups: dict[HessianGroup, list[Variant]] = {}
    for variant in variants:
        mixture = variant.mixture or problem.reference
        group = HessianGroup(mixture, variant.seed, variant.trace_normalised)
        groups.setdefault(group, []).append(variant)
    return groups


def statistics_needed(asked: Iterable[Variant]) -> frozenset[Statistic]:
    """Return the statistics that a run over these variants sums: always the small sums; Σ x xᵀ only if some step
    declares it or a variant's mixture is found by a search. Without Σ x xᵀ no loss of any variant can be measured.
    Sums of two streams are included only if a step declares them."""
    needs = [_with_measure(step.step.needs) for variant in asked for step in variant.recipe]
    compared = [frozenset({Statistic.GRAM}) for variant in asked if variant.search or variant.found_by]
    return frozenset(VECTORS).union(*map(of_inputs, needs), *compared)


def gradients_needed(asked: Iterable[Variant], reference: Mixture) -> set[tuple[str, int]]:
    """Return the (corpus, seed) pairs over which some step of these variants needs gradients of the loss."""
    seen = [
        (step.mixture or variant.mixture or reference, variant.seed)
        for variant in asked
        for step in variant.recipe
        if Gradient.SQUARE in COMPRESSORS[step.method].needs
    ]
    return {(corpus, seed) for mixture, seed in seen for corpus in mixture.corpora}


def of_inputs(needs: frozenset[Need]) -> frozenset[Statistic]:
    """Return those needs that are sums over a site's inputs."""
    return frozenset(which for which in needs if isinstance(which, Statistic))


def _with_measure(needs: frozenset[Need]) -> frozenset[Need]:
    """Add both sums of two streams if a step targets the dense model's outputs: its loss is measured against them."""
    return needs | OF_TWO_STREAMS if streams_of(of_inputs(needs)) > 1 else needs


def needed(
    groups: Mapping[HessianGroup, Sequence[Variant]], always: frozenset[Statistic] = frozenset({Statistic.GRAM})
) -> dict[HessianGroup, frozenset[Need]]:
    """Return the statistics that each group's recipes declare, plus those `always` mixed and, if a step changes biases,
    the mean input. A step with its own mixture adds a group. Allocators are left out: they have already run."""
    found: dict[HessianGroup, frozenset[Need]] = {}
    for group, members in groups.items():
        found[group] = found.get(group, always)
        for step in (step for variant in members for step in variant.recipe if step != variant.allocator):
            found[group] |= _with_measure(step.step.needs) & MEASURED
            seen = group if step.mixture is None else group.on(step.mixture)
            found[seen] = found.get(seen, always) | step.step.needs
    return found


class SiteStatistics:
    """Statistics of one site for several groups; thread-safe, read on first use and freed after the last user."""

    def __init__(
        self, problem: BlockProblem, site: Site, needs: Mapping[HessianGroup, frozenset[Need]], *, users: int
    ) -> None:
        self._problem, self._site, self._where = problem, site, f"{problem.name}.{site.name}"
        by_trace = frozenset({Statistic.SQUARE_SUM})
        self._needed = {group: each | by_trace if group.trace_normalised else each for group, each in needs.items()}
        every = of_inputs(frozenset[Need]().union(*self._needed.values()))
        self._splits = (False, True) if Statistic.GRAM in every else (False,)
        cached = dataclasses.replace(problem.cached, wanted=every)
        self._read = functools.partial(cached.read, block=problem.block, site=site)
        self._left, self._lock = users, threading.Lock()
        self._sums: dict[Place, MeanSum] | None = None
        self._grad_squares: dict[tuple[str, int], dict[str, Tensor]] = {}

    def __call__(self, group: HessianGroup, *, held_out: bool = False) -> tuple[Statistics, int]:
        """Return a group's statistics, on the device, and their number of tokens; for held-out windows only `MEASURED`.

        Raises `EmptyStatistics`, `NotFinite`, and the errors of reading the store.
        """
        with self._lock:
            if self._sums is None:
                self._sums = self._summed()
            sums = {corpus: self._sums[corpus, group.seed, held_out] for corpus in group.mixture.corpora}
            gradients = {} if held_out else self._gradients(group)
        wanted = of_inputs(self._needed[group] & MEASURED if held_out else self._needed[group])
        found = {corpus: each.means(f"{self._where} ({corpus})") for corpus, each in sums.items()}
        means = {corpus: {which: every[which] for which in wanted} for corpus, every in found.items()}
        mixed = group.mixture.mix(means, trace_normalised=group.trace_normalised)
        on_device = {which: mean.to(self._problem.device) for which, mean in mixed.items()}
        traces = group.mixture.traces(means) if group.trace_normalised else None
        grad_squares = {
            f"{self._problem.name}.{name}": group.mixture.mixed(parts, Gradient.SQUARE.degree, traces)
            for name, parts in gradients.items()
        }
        moved = {name: mean_OI.to(self._problem.device) for name, mean_OI in grad_squares.items()}
        return Statistics(on_device, self._where, moved), sum(each.tokens for each in sums.values())

    def _gradients(self, group: HessianGroup) -> dict[str, dict[str, Tensor]]:
        """Return matrix -> corpus -> E[g²] if the group needs it; each corpus is read once for all groups."""
        if Gradient.SQUARE not in self._needed[group]:
            return {}
        assert self._problem.gradients is not None, "who needs gradients has them collected first"
        for corpus in group.mixture.corpora:
            place = corpus, group.seed
            if place not in self._grad_squares:
                means = self._problem.gradients.means(*place, self._problem.block, self._site, self._where)
                self._grad_squares[place] = means
        of_corpora = {corpus: self._grad_squares[corpus, group.seed] for corpus in group.mixture.corpora}
        names = [matrix.name for matrix in self._site.matrices]
        return {name: {corpus: means[name] for corpus, means in of_corpora.items()} for name in names}

    def group_is_done(self) -> None:
        """Free the sums after the last user. Each user calls this once."""
        with self._lock:
            self._left -= 1
            if not self._left:
                self._sums, self._grad_squares = None, {}

    def _summed(self) -> dict[Place, MeanSum]:
        """Read every set once, in an order independent of which groups are solved: sums stay bit-identical."""
        of_corpora: dict[tuple[str, int], frozenset[Statistic]] = {}
        for group, needs in self._needed.items():
            for corpus in group.mixture.corpora:
                of_corpora[corpus, group.seed] = of_corpora.get((corpus, group.seed), frozenset()) | of_inputs(needs)
        sums: dict[Place, MeanSum] = {}
        wanted: dict[str, list[tuple[MeanSum, float]]] = {}
        for (corpus, seed), needs in sorted(of_corpora.items()):
            for held_out in self._splits:
                total = sums[corpus, seed, held_out] = MeanSum(needs & MEASURED if held_out else needs)
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


class OutputEnergies:
    """Output energies tr(W H Wᵀ), the denominators of relative losses, of one block's matrices under one mixture:
    matrix name -> (on calibration windows, on held-out windows or None).

    They depend on no setting of a method. They are computed once per mixture and stored beside the moments, which saves
    two of the three products that the losses of one more variant take. With sequential inputs they belong to one
    variant alone and are not stored.
    """

    def __init__(self, cached: CachedMoments, block: int, mixture: Any) -> None:
        """`mixture`: what determines the Hessians besides model and block: sets, weights and their normalisation."""
        self._cached, self._block = cached, block
        self._key = digest_of([ENERGIES_FORMAT, cached.model, cached.dtype, block, mixture])
        self._artifact = cached.store.find(ENERGIES, self._key) if cached.upstream == DENSE else None
        stored = cached.store.read_bytes(self._artifact, ENERGIES_FILE) if self._artifact else b"{}"
        self._known: dict[str, tuple[float, float | None]] = {
            name: (calibration, held_out) for name, (calibration, held_out) in json.loads(stored).items()
        }

    def get(self, matrix: str) -> tuple[float, float | None] | None:
        return self._known.get(matrix)

    def add(self, matrix: str, calibration: float, held_out: float | None) -> None:
        self._known.setdefault(matrix, (calibration, held_out))

    def keep(self, matrices: int) -> None:
        """Store the energies if they are complete: of as many matrices as `matrices`."""
        if self._cached.upstream == DENSE and self._artifact is None and len(self._known) == matrices:
            provenance = {"model": self._cached.model, "block": self._block, "dtype": self._cached.dtype}
            with self._cached.store.publish(ENERGIES, self._key, provenance) as folder:
                (folder / ENERGIES_FILE).write_text(json.dumps(self._known))
