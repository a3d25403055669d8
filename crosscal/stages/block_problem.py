"""A block to be solved: its weights, which variants share what, and the statistics and energies of its sites.

Each set of a site is read once, added to its corpus's sum and let go. So what is held does not grow with the sets
(shards) that a corpus consists of: a matrix for each corpus, seed and split that some group mixes, and the one being
read. Mixtures of corpora are made from the sums, one for each group being solved; corpora, not sets, are brought to one
trace where a variant asks for that.

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
from crosscal.stages.moments import DENSE, Cached
from crosscal.stages.sample import Sample
from crosscal.statistics import OF_TWO_STREAMS, VECTORS, Gradient, MeanSum, Mixture, Statistic, streams_of
from crosscal.store import digest_of
from crosscal.variants import Variant

ENERGIES = "energies"
ENERGIES_FILE = "energies.json"
ENERGIES_FORMAT = 1  # a change of what is computed makes new keys

MEASURED = frozenset({Statistic.GRAM, Statistic.SUM}) | OF_TWO_STREAMS
"""What losses are measured with."""
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
    cached: Cached
    samples: Mapping[tuple[str, int], Sample]
    """(corpus, seed) -> what stands for it."""
    reference: Mixture
    """Where the loss of methods that need no data is measured."""
    device: str
    sparsities: Mapping[str, SparsitiesOf] = field(default_factory=dict)
    """What was allotted, by the names of the variants with an allocator."""
    gradients: Gradients | None = None
    """Where some step needs them."""
    measured_on: tuple[str, ...] = ()
    """Corpora on whose own held-out text solutions are measured, whatever they were solved on."""
    why_dense: Callable[[str], str] = lambda parameter: ""
    """Of a parameter by its full name: why integers in its place cannot be written packed; empty where they can."""

    def recipe(self, variant: Variant, site: Site) -> Recipe:
        """The variant's steps, with what was allotted to the matrices of a site."""
        if variant.allocator is None:
            return variant.steps
        layers = [f"{self.name}.{matrix.name}" for matrix in site.matrices]
        return allotted(variant.steps, self.sparsities[variant.name], layers)

    @property
    def always_mixed(self) -> frozenset[Statistic]:
        """H, which losses are measured with. Where no step of the run needs it there is none, and no loss: then its
        diagonal, for dead inputs."""
        return frozenset({Statistic.GRAM if self.cached.measures_losses else Statistic.SQUARE_SUM})

    def stored_dtype(self, matrix: MatrixRef) -> torch.dtype:
        """The dtype that the checkpoint stores a matrix in."""
        return self.parameters[matrix.parameter].dtype


@dataclass(frozen=True)
class Group:
    """Variants that share a Hessian."""

    mixture: Mixture
    seed: int
    trace_normalised: bool

    def on(self, mixture: Mixture) -> Group:
        """The same with another mixture, which a step has for itself."""
        return dataclasses.replace(self, mixture=mixture)


def grouped(problem: BlockProblem, variants: Iterable[Variant]) -> dict[Group, list[Variant]]:
    groups: dict[Group, list[Variant]] = {}
    for variant in variants:
        mixture = variant.mixture or problem.reference
        group = Group(mixture, variant.seed, variant.trace_normalised)
        groups.setdefault(group, []).append(variant)
    return groups


def statistics_needed(asked: Iterable[Variant]) -> frozenset[Statistic]:
    """What a run over these variants sums: the small sums in any case, Σ x xᵀ only if some step declares it, or a
    mixture is to be found. Without it no loss can be measured, of any variant. Sums of two streams are summed for the
    variants that declare them alone."""
    needs = [_with_measure(step.step.needs) for variant in asked for step in variant.recipe]
    compared = [frozenset({Statistic.GRAM}) for variant in asked if variant.search or variant.found_by]
    return frozenset(VECTORS).union(*map(of_inputs, needs), *compared)


def gradients_needed(asked: Iterable[Variant], reference: Mixture) -> set[tuple[str, int]]:
    """The (corpus, seed) pairs over which some step of these variants needs the loss's gradients."""
    seen = [
        (step.mixture or variant.mixture or reference, variant.seed)
        for variant in asked
        for step in variant.recipe
        if Gradient.SQUARE in COMPRESSORS[step.method].needs
    ]
    return {(corpus, seed) for mixture, seed in seen for corpus in mixture.corpora}


def of_inputs(needs: frozenset[Need]) -> frozenset[Statistic]:
    """Those of the needs that are sums over a site's inputs."""
    return frozenset(which for which in needs if isinstance(which, Statistic))


def _with_measure(needs: frozenset[Need]) -> frozenset[Need]:
    """A step that aims at the dense model's outputs is measured against them, which takes both sums of two streams."""
    return needs | OF_TWO_STREAMS if streams_of(of_inputs(needs)) > 1 else needs


def needed(
    groups: Mapping[Group, Sequence[Variant]], always: frozenset[Statistic] = frozenset({Statistic.GRAM})
) -> dict[Group, frozenset[Need]]:
    """What the recipes of each group declare, and of the mixtures that some of their steps have for themselves; besides
    what is `always` mixed, and the mean input where a step changes biases. Allocators are done by then."""
    found: dict[Group, frozenset[Need]] = {}
    for group, members in groups.items():
        found[group] = found.get(group, always)
        for step in (step for variant in members for step in variant.recipe if step != variant.allocator):
            found[group] |= _with_measure(step.step.needs) & MEASURED
            seen = group if step.mixture is None else group.on(step.mixture)
            found[seen] = found.get(seen, always) | step.step.needs
    return found


class SiteStatistics:
    """Of one site for several groups, whichever lane asks first; let go after the last user."""

    def __init__(
        self, problem: BlockProblem, site: Site, needs: Mapping[Group, frozenset[Need]], *, users: int
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

    def __call__(self, group: Group, *, held_out: bool = False) -> tuple[Statistics, int]:
        """A group's statistics, on the device, and the tokens behind them; of held-out windows what losses take.

        Raises `EmptyStatistics`, `NotFinite`, and what reading the store raises.
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

    def _gradients(self, group: Group) -> dict[str, dict[str, Tensor]]:
        """Matrix -> corpus -> E[g²], where the group needs it; read once for all groups."""
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
        """To be called once by each user; after the last nothing is held."""
        with self._lock:
            self._left -= 1
            if not self._left:
                self._sums, self._grad_squares = None, {}

    def _summed(self) -> dict[Place, MeanSum]:
        """Every set once, in an order that does not depend on which groups are solved: sums keep their bits."""
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


class Energies:
    """What losses are relative to, tr(W H Wᵀ), of one block's matrices under one mixture, by the matrices' names:
    (calibration, held-out or None).

    No setting of a method enters it, so it is computed once per mixture and kept beside the moments it comes from: two
    of the three products that the losses of one more variant would take. Inputs that come through a variant's own
    compressed blocks belong to that variant alone, and are not kept.
    """

    def __init__(self, cached: Cached, block: int, mixture: Any) -> None:
        """`mixture`: what determines the Hessians, besides model and block: sets, weights and their normalisation."""
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
        """Store them, once they are those of all so many matrices."""
        if self._cached.upstream == DENSE and self._artifact is None and len(self._known) == matrices:
            provenance = {"model": self._cached.model, "block": self._block, "dtype": self._cached.dtype}
            with self._cached.store.publish(ENERGIES, self._key, provenance) as folder:
                (folder / ENERGIES_FILE).write_text(json.dumps(self._known))
