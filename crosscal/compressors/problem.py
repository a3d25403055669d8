"""Input and output of a method for one layer: problem and solution. Shapes: O outputs, I inputs, G groups of inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from crosscal.compressors.selection import count_true
from crosscal.compressors.state import Dense, Grid, Layer, LowRank, Need, StoredForm
from crosscal.compressors.streams import Streams
from crosscal.errors import NotFinite, NotPositiveDefinite, StatisticsError
from crosscal.statistics.factor import InverseFactor, factor
from crosscal.statistics.finite import all_finite
from crosscal.statistics.statistic import Statistic

PANEL_INPUTS = 128  # of a loss: small enough to skip nearly half of the Hessian, large enough for fast matrix products


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One linear layer to compress: replace W by V so that tr((W - V) H (W - V)ᵀ) stays small.

    Raises `StatisticsError` for a Hessian whose shape or dtype does not match the weight, `NotFinite` for either of
    them, `NotPositiveDefinite` for a negative diagonal.
    """

    name: str
    weight_OI: Tensor
    """The dense matrix W, in float32 or float64, the dtype of the solve."""
    hessian_II: Tensor | None = None
    """Second moment of the inputs per token, undamped, in the weight's dtype. Without it no loss is measured."""
    further: Mapping[Need, Tensor] = field(default_factory=dict)
    """Further statistics: means per token of |x| and of x; of x² if there is no Hessian; `cross` and `drift`, with
    which losses are measured against the dense model's outputs (see `streams`); the mean per window of the squared
    gradients [O, I]."""
    shared_factor: InverseFactor | None = None
    """A factor of `hessian_II`, computed once for several layers; used if its damping is the requested one."""
    stored_dtype: torch.dtype | None = None
    """Dtype of the saved weights: solutions are rounded to it, and their losses are those of the rounded weights."""

    bias_O: Tensor | None = None
    """The linear's bias, if it has one."""
    known_energy: float | None = None
    """tr(W H Wᵀ), if already computed."""

    def __post_init__(self) -> None:
        if not all_finite(self.weight_OI):
            raise NotFinite(
                "the weight is not finite", where=self.name, do="Check the model: it is broken before compression."
            )
        if self.hessian_II is not None:
            self._check_hessian(self.hessian_II)

    def _check_hessian(self, hessian_II: Tensor) -> None:
        inputs = self.weight_OI.shape[1]
        if hessian_II.shape != (inputs, inputs):
            raise StatisticsError(
                "the shapes of weight and Hessian do not match",
                where=self.name,
                got=f"{tuple(self.weight_OI.shape)} and {tuple(hessian_II.shape)}",
            )
        if hessian_II.dtype != self.weight_OI.dtype:
            raise StatisticsError(
                "weight and Hessian must have one dtype",
                where=self.name,
                got=f"{self.weight_OI.dtype} and {hessian_II.dtype}",
            )
        if not all_finite(hessian_II):
            raise NotFinite("the Hessian is not finite", where=self.name, do="Calibrate in float32 or bfloat16.")
        if (hessian_II.diagonal() < 0).any():
            raise NotPositiveDefinite(
                "the Hessian has a negative mean square",
                where=self.name,
                got=f"{float(hessian_II.diagonal().min()):g} on the diagonal",
                do="It is not a second moment: repeat the calibration.",
            )

    def factor(self, damping: float) -> InverseFactor:
        """Return the shared factor if it has this damping, otherwise a new one."""
        if self.shared_factor is not None and self.shared_factor.damping == damping:
            return self.shared_factor
        if self.hessian_II is None:
            raise StatisticsError("there is no Hessian to factor", where=self.name)
        return factor(self.hessian_II, damping, name=self.name)

    @property
    def streams(self) -> Streams | None:
        """Moments of both streams, for losses against the dense model's outputs; None if there is only one."""
        return Streams.of({Statistic.GRAM: self.hessian_II, **self.further}.get)

    @cached_property
    def energy(self) -> float | None:
        """Output energy tr(W H Wᵀ), the denominator of relative losses; with two streams that of the dense model."""
        if self.known_energy is not None or self.hessian_II is None:
            return self.known_energy
        if self.streams is not None:
            return self.streams.energy(self.weight_OI)
        return quadratic_loss(self.weight_OI, self.hessian_II)


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """A compressed layer and its loss on the problem's own Hessian."""

    weight_OI: Tensor
    """The matrix V for inputs that are not divided by scales; in the solving dtype, from the parts as stored."""
    loss: float | None
    """tr(ΔW H ΔWᵀ), with two streams E‖W x - V y‖²: the squared output error per token; None without H."""
    relative_loss: float | None
    """`loss` / `energy`; 0 if the energy is 0, None without H."""
    base: StoredForm
    """The stored part: `weight_OI` · scale without the low-rank part."""
    low_rank: LowRank | None = None
    bias_change_O: Tensor | None = None
    """Change of the bias as stored."""
    damping: float | None = None
    scale_I: Tensor | None = None
    """Divisor of the layer's inputs, absorbed by the module that produces them."""

    @property
    def stored_weight_OI(self) -> Tensor:
        """The matrix in the compressed model: `weight_OI` · scale."""
        return self.base.weight_OI if self.low_rank is None else self.base.weight_OI + self.low_rank.weight_OI

    @property
    def grid(self) -> Grid | None:
        """The integers and scales if `base` is a `Grid`, else None."""
        return self.base if isinstance(self.base, Grid) else None

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros in `base`."""
        return count_true(self.base.weight_OI == 0) / self.weight_OI.numel()


class Compressor(Protocol):
    """A method with its settings: a pure function of the problem."""

    def compress(self, problem: LayerProblem) -> LayerSolution:
        """Solve one layer. Raises `UsageError` for settings that do not fit it, `StatisticsError`."""
        ...


def quadratic_loss(difference_OI: Tensor, hessian_II: Tensor) -> float:
    """Return tr(D H Dᵀ) = Σ_o d_o H d_oᵀ for a symmetric H: blocks below the diagonal count twice, blocks above it are
    skipped. Sums in float64."""
    total = torch.zeros((), dtype=torch.float64, device=difference_OI.device)
    for start in range(0, len(hessian_II), PANEL_INPUTS):
        stop = start + PANEL_INPUTS
        own_OB = difference_OI[:, start:stop]
        product_OB = own_OB @ hessian_II[start:stop, start:stop]
        product_OB.addmm_(difference_OI[:, stop:], hessian_II[stop:, start:stop], alpha=2)
        total += product_OB.mul_(own_OB).sum(1).sum(dtype=torch.float64)
    return float(total)


def output_loss(
    difference_OI: Tensor, hessian_II: Tensor, bias_change_O: Tensor | None = None, mean_I: Tensor | None = None
) -> float:
    """Return E‖D x - c‖² = tr(D H Dᵀ) - 2 cᵀ D E[x] + ‖c‖², where c is the change of the bias."""
    loss = quadratic_loss(difference_OI, hessian_II)
    if bias_change_O is None:
        return loss
    assert mean_I is not None, "a changed bias is measured with the mean input"
    change_O, mean_change_O = bias_change_O.double(), difference_OI.double() @ mean_I.double()
    return loss + float(change_O.square().sum() - 2 * change_O @ mean_change_O)


def row_losses_O(difference_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Return d H dᵀ of every row."""
    return ((difference_OI @ hessian_II) * difference_OI).sum(1)


def solved(problem: LayerProblem, layer: Layer, scale_I: Tensor | None = None) -> LayerSolution:
    """Round to the stored dtype, check and measure. Every recipe ends here, so every loss is that of the problem as
    given. `scale_I`: the scales of the layer's site.

    Raises `NotFinite`, and `NotPositiveDefinite` for a loss further below zero than roundoff explains.
    """
    base, low_rank = _as_stored(layer.base, problem.stored_dtype), layer.low_rank
    if low_rank is not None and problem.stored_dtype is not None:
        dtype = problem.weight_OI.dtype
        left_OK, right_KI = (part.to(problem.stored_dtype).to(dtype) for part in (low_rank.left_OK, low_rank.right_KI))
        low_rank = LowRank(left_OK, right_KI)
    weight_OI = base.weight_OI if low_rank is None else base.weight_OI + low_rank.weight_OI
    weight_OI = weight_OI if scale_I is None else weight_OI / scale_I
    change_O = _bias_as_stored(problem, layer)
    loss, relative = _losses(problem, problem.weight_OI - weight_OI, change_O)
    if not (all_finite(weight_OI) if loss is None else math.isfinite(loss)):
        raise NotFinite("the solution is not finite", where=problem.name, do="Raise damping.")
    return LayerSolution(weight_OI, loss, relative, base, low_rank, change_O, layer.damping, scale_I)


def _bias_as_stored(problem: LayerProblem, layer: Layer) -> Tensor | None:
    """Change of the stored bias: b + c is rounded, not c."""
    if layer.bias_change_O is None or problem.stored_dtype is None:
        return layer.bias_change_O
    bias_O = torch.zeros_like(layer.bias_change_O) if problem.bias_O is None else problem.bias_O
    return (bias_O + layer.bias_change_O).to(problem.stored_dtype).to(bias_O.dtype) - bias_O


def _losses(problem: LayerProblem, difference_OI: Tensor, change_O: Tensor | None) -> tuple[float | None, float | None]:
    """Return (loss, relative loss)."""
    if problem.hessian_II is None:
        return None, None
    streams, energy = problem.streams, problem.energy
    if streams is None:
        loss = output_loss(difference_OI, problem.hessian_II, change_O, problem.further.get(Statistic.SUM))
    else:
        assert change_O is None, "plans refuse a changed bias beside two streams"
        loss = streams.loss(problem.weight_OI, difference_OI)
    if loss < 0:
        of_streams = 0.0 if streams is None or energy is None else energy
        loss = _zero_if_roundoff(loss, difference_OI, problem.name, problem.hessian_II, of_streams)
    return loss, loss / energy if energy is not None and energy > 0 else 0.0


def _as_stored(base: StoredForm, stored_dtype: torch.dtype | None) -> StoredForm:
    """Return the form with its numbers rounded as the checkpoint stores them."""
    if not isinstance(base, Dense) or stored_dtype in (None, base.weight_OI.dtype):
        return base
    rounded_OI = base.weight_OI.to(stored_dtype).to(base.weight_OI.dtype)
    return base if torch.equal(rounded_OI, base.weight_OI) else Dense(rounded_OI)


def _zero_if_roundoff(loss: float, difference_OI: Tensor, name: str, hessian_II: Tensor, energy: float = 0.0) -> float:
    """Return 0 for a negative loss within roundoff, else raise. `energy`: magnitude of further terms that cancel."""
    # For a second moment, |d H dᵀ| summed term by term is at most I · Σ_j d_j² H_jj; the allowance is its roundoff.
    diagonal_loss = float((difference_OI.square() @ hessian_II.diagonal()).sum())
    allowance = torch.finfo(difference_OI.dtype).eps * difference_OI.shape[1] * (diagonal_loss + energy)
    if loss < -allowance:
        raise NotPositiveDefinite(
            "the Hessian is not positive semidefinite",
            where=name,
            got=f"a squared error of {loss:g}",
            do="It is not a second moment: repeat the calibration.",
        )
    return 0.0
