"""The state of a site before and after each step of a recipe.

A step is a function from state to state. A `Layer` holds one matrix and its current replacement, in any form; a `Site`
holds the layers that read one input, since they share its statistics. All are immutable: a step returns new ones.

Shapes: O outputs, I inputs, G groups of inputs, K rank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crosscal.compressors.grid import from_ints
from crosscal.errors import StatisticsError, UsageError
from crosscal.statistics.factor import Eigensystem, InverseFactor, eigensystem, factor
from crosscal.statistics.gradients import Gradient
from crosscal.statistics.statistic import Statistic

Need = Statistic | Gradient
"""A statistic that a step may declare: of a site's inputs, or of the loss gradients of its matrices."""


class Statistics:
    """Means of the statistics that a step declared, and what is derived from them, computed once. Means are per token
    for a site's inputs, per window for the gradients of each layer.

    Access to any other statistic raises `StatisticsError`, so `needs` is always complete.
    """

    def __init__(
        self,
        means: Mapping[Statistic, Tensor],
        name: str = "site",
        grad_squares: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`grad_squares`: E[g²] [O, I] by layer name."""
        self._means, self._name, self._grad_squares = dict(means), name, dict(grad_squares or {})
        self._factors: dict[float, InverseFactor] = {}
        self._eigensystems: dict[float, Eigensystem] = {}

    def __getitem__(self, which: Statistic) -> Tensor:
        if which not in self._means:
            raise self._undeclared(which)
        return self._means[which]

    def grad_square_OI(self, layer: str) -> Tensor:
        """E[g²] of a layer's matrix, g = ∂loss/∂W of one window: the diagonal of its empirical Fisher matrix."""
        if layer not in self._grad_squares:
            raise self._undeclared(Gradient.SQUARE)
        return self._grad_squares[layer]

    def _undeclared(self, which: Need) -> StatisticsError:
        return StatisticsError("a step asks for a statistic that it does not declare", where=self._name, got=which)

    def get(self, which: Statistic) -> Tensor | None:
        """Return a mean, or None if it was not declared."""
        return self._means.get(which)

    def only(self, needs: Collection[Need]) -> Statistics:
        """Restrict to the statistics that a step declared; factors and eigensystems of H are shared."""
        means = {which: self[which] for which in needs if isinstance(which, Statistic)}
        part = Statistics(means, self._name, self._grad_squares if Gradient.SQUARE in needs else None)
        if Statistic.GRAM in needs:
            part._factors, part._eigensystems = self._factors, self._eigensystems
        return part

    def scaled(self, scale_I: Tensor) -> Statistics:
        """Return the statistics of x / s and W · s, computed exactly from those of x and W."""
        moved = {which: which.divided(mean, scale_I) for which, mean in self._means.items()}
        gradients = {name: Gradient.SQUARE.divided(each, scale_I) for name, each in self._grad_squares.items()}
        return Statistics(moved, self._name, gradients)

    @property
    def hessian_II(self) -> Tensor:
        """H = E[x xᵀ]."""
        return self[Statistic.GRAM]

    @property
    def square_I(self) -> Tensor:
        """E[x²]; the diagonal of H if H is available."""
        return self.hessian_II.diagonal() if Statistic.GRAM in self._means else self[Statistic.SQUARE_SUM]

    def factor(self, damping: float) -> InverseFactor:
        """Return the damped Cholesky factor of H, shared by all layers and settings."""
        if damping not in self._factors:
            self._factors[damping] = factor(self.hessian_II, damping, name=self._name)
        return self._factors[damping]

    def add_factor(self, factored: InverseFactor) -> None:
        """Reuse a factor of this H that was computed elsewhere."""
        self._factors[factored.damping] = factored

    def eigensystem(self, damping: float) -> Eigensystem:
        """Return the eigensystem of the damped H, scaled to a unit diagonal; shared by all layers and settings."""
        if damping not in self._eigensystems:
            self._eigensystems[damping] = eigensystem(self.hessian_II, damping, name=self._name)
        return self._eigensystems[damping]


class StoredForm(Protocol):
    """A stored form of a matrix."""

    @property
    def weight_OI(self) -> Tensor:
        """The matrix that it represents."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """Unquantized numbers, zeros included."""

    weight_OI: Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Integers and scales of a symmetric quantization: V = ints · scale, the scale shared by a group of inputs."""

    ints_OI: Tensor
    scale_OG: Tensor
    bits: int
    group_size: int | None
    """Inputs per scale; None means one scale per row."""
    stored_dtype: torch.dtype | None = None
    """Dtype of the stored scales, to which products are rounded when the checkpoint is loaded."""

    @property
    def weight_OI(self) -> Tensor:
        return self._weight_OI

    @functools.cached_property
    def _weight_OI(self) -> Tensor:
        outputs, groups = self.scale_OG.shape
        ints_OGC = self.ints_OI.to(self.scale_OG.dtype).view(outputs, groups, -1)
        return from_ints(ints_OGC, self.scale_OG[..., None], self.stored_dtype).view(outputs, -1)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank matrix L R, added to the base."""

    left_OK: Tensor
    right_KI: Tensor

    @property
    def weight_OI(self) -> Tensor:
        return self.left_OK @ self.right_KI


@dataclass(frozen=True, eq=False)
class Layer:
    """One matrix: its target and its current replacement."""

    name: str
    target_OI: Tensor
    """The dense matrix, in float32 or float64: the reference for outputs. Corrections (`qep`) and scales change it."""
    base: StoredForm
    keep_OI: Tensor | None = None
    """False where an earlier step pruned: those weights stay 0 in later steps (except where `swaps` exchanges them)."""
    low_rank: LowRank | None = None
    bias_change_O: Tensor | None = None
    """Added to the linear's bias."""
    stored_dtype: torch.dtype | None = None
    """Dtype of the matrix in the checkpoint."""
    damping: float | None = None
    """Damping of the last step that damped the Hessian."""

    @property
    def weight_OI(self) -> Tensor:
        """The matrix used in the forward pass."""
        return self.base.weight_OI if self.low_rank is None else self.base.weight_OI + self.low_rank.weight_OI

    @property
    def base_target_OI(self) -> Tensor:
        """Target of the base: the target matrix minus the low-rank part."""
        return self.target_OI if self.low_rank is None else self.target_OI - self.low_rank.weight_OI

    def changed(self, base: StoredForm, **more: object) -> Layer:
        """Return the same layer with another base."""
        return dataclasses.replace(self, base=base, **more)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class Site:
    """The layers that read one input, and its statistics."""

    name: str
    layers: tuple[Layer, ...]
    statistics: Statistics
    scale_I: Tensor | None = None
    """s: inputs are divided by it and weights multiplied by it; the module that produces the input absorbs 1/s."""
    storable_I: Callable[[Tensor], Tensor] | None = None
    """Maps s to the nearest s whose 1/s the module that produces the input can store; None if nothing can absorb it."""

    def each(self, change: Callable[[Layer], Layer]) -> Site:
        """Return the site with `change` applied to every layer."""
        return dataclasses.replace(self, layers=tuple(change(layer) for layer in self.layers))

    def nearest_I(self, scale_I: Tensor) -> Tensor | None:
        """Return the nearest scales that inputs can be divided by; None if nothing can absorb them."""
        if self.storable_I is None:
            return None
        return (
            self.storable_I(scale_I) if self.scale_I is None else self.storable_I(scale_I * self.scale_I) / self.scale_I
        )

    def scaled(self, scale_I: Tensor) -> Site:
        """Return the site for inputs divided by s, with the same outputs. `recipe.solve` scales the statistics.

        Raises `UsageError` for integers, whose scales are shared by inputs.
        """
        whole_I = scale_I if self.scale_I is None else self.scale_I * scale_I
        return dataclasses.replace(self.each(lambda layer: _scaled(layer, scale_I)), scale_I=whole_I)


def _scaled(layer: Layer, scale_I: Tensor) -> Layer:
    if not isinstance(layer.base, Dense):
        raise UsageError(
            "a quantized matrix cannot be scaled any more", where=layer.name, do="Scale first, then round."
        )
    low_rank = layer.low_rank and LowRank(layer.low_rank.left_OK, layer.low_rank.right_KI * scale_I)
    base = Dense(layer.base.weight_OI * scale_I)
    return dataclasses.replace(layer, target_OI=layer.target_OI * scale_I, base=base, low_rank=low_rank)
