"""A block to be solved, and which of a sweep's variants share what. Shapes: O outputs, I inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.models.sites import LeftDense, MatrixRef, Site
from crosscal.stages.moments import Cached
from crosscal.stages.sample import Sample
from crosscal.statistics import Mixture
from crosscal.variants import Variant


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
