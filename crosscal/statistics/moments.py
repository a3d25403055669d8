"""Input moments: the sums over tokens that every layer-wise method starts from.

Shapes: T tokens, I inputs of the site. Sums, never means: `a + b` of two disjoint sets of tokens is exact bookkeeping,
so shards, corpus versions and machines merge by addition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.errors import EmptyStatistics, NotFinite, StatisticsError
from crosscal.statistics.half_product import add_half_product
from crosscal.statistics.numba_sums import add_sums

CACHED_ROWS = 512  # multiplied and summed at a time on a CPU, while its caches hold them
MIRRORED_ROWS = 128  # at once: a block and its transpose fit the cache


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Sums over the tokens x that reached one input site."""

    gram_II: Tensor
    """Σ x xᵀ, symmetric."""
    abs_sum_I: Tensor
    """Σ |x|."""
    sum_I: Tensor
    """Σ x."""
    tokens: int
    """How many tokens were summed."""
    weighted_tokens: float | None = None
    """The sum of the tokens' weights, where the sums are weighted; None where every token weighs 1."""

    @classmethod
    def of(cls, input_TI: Tensor) -> InputMoments:
        """Moments of the rows of one matrix, summed in its own precision or float32, whichever is wider."""
        accumulator = MomentsAccumulator(
            input_TI.shape[-1], dtype=torch.promote_types(input_TI.dtype, torch.float32), device=input_TI.device
        )
        accumulator.add(input_TI)
        return accumulator.moments()

    @classmethod
    def zero(cls, inputs: int, dtype: torch.dtype = torch.float32) -> InputMoments:
        """The neutral element of `+`."""
        return cls(
            torch.zeros(inputs, inputs, dtype=dtype),
            torch.zeros(inputs, dtype=dtype),
            torch.zeros(inputs, dtype=dtype),
            0,
        )

    def __add__(self, other: InputMoments) -> InputMoments:
        """Moments of both sets of tokens. Raises `StatisticsError` when the numbers of inputs differ."""
        if self.inputs != other.inputs:
            raise StatisticsError(
                "moments of different sites cannot be added", got=f"{self.inputs} and {other.inputs} inputs"
            )
        return InputMoments(
            self.gram_II + other.gram_II,
            self.abs_sum_I + other.abs_sum_I,
            self.sum_I + other.sum_I,
            self.tokens + other.tokens,
            None if self.weighted_tokens is None is other.weighted_tokens else self.mass + other.mass,
        )

    def weighted(self, weight: float) -> InputMoments:
        """The same with every token counted `weight` times: `a.weighted(w) + b` is a sum over both, weights kept."""
        if weight == 1.0:
            return self
        gram_II, abs_sum_I, sum_I = self.gram_II * weight, self.abs_sum_I * weight, self.sum_I * weight
        return InputMoments(gram_II, abs_sum_I, sum_I, self.tokens, self.mass * weight)

    @property
    def mass(self) -> float:
        """What means divide by: the sum of the tokens' weights, and so their number where none is weighted."""
        return self.tokens if self.weighted_tokens is None else self.weighted_tokens

    @property
    def inputs(self) -> int:
        return self.gram_II.shape[0]

    def hessian_II(self, name: str = "moments") -> Tensor:
        """H = Σ x xᵀ / mass, the second moment per token. Raises `EmptyStatistics`, `NotFinite`."""
        if self.tokens == 0:
            raise EmptyStatistics(
                "no token ever reached this input",
                where=name,
                do="Calibrate on more windows; an expert may be starved.",
            )
        # Σ x² bounds every product sum (Cauchy-Schwarz), so a finite diagonal is a finite matrix.
        if not torch.isfinite(self.gram_II.diagonal()).all():
            raise NotFinite(
                "the calibration inputs were not finite", where=name, do="Calibrate in float32 or bfloat16."
            )
        return self.gram_II / self.mass

    @property
    def mean_abs_I(self) -> Tensor:
        """Σ |x| / mass; zero without tokens."""
        return self.abs_sum_I / (self.mass or 1)


class MomentsAccumulator:
    """Adds up the moments of a stream of inputs, computing one triangle of the Gram matrix only.

    Inputs in half precision are multiplied as they are on a GPU and summed in float32; otherwise inputs are widened to
    `dtype` first. The vectors are summed in `dtype` over 64 rows (on a GPU a batch), in float64 from there on, and
    handed out in `dtype`.
    """

    def __init__(self, inputs: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self._upper_II = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self._abs_sum_I = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._sum_I = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, input_TI: Tensor) -> None:
        """Add the rows of a matrix (any leading shape is flattened to tokens). Raises `StatisticsError` on a wrong
        width."""
        if input_TI.shape[-1] != len(self._upper_II):
            raise StatisticsError(
                "inputs of another width", got=f"{input_TI.shape[-1]} instead of {len(self._upper_II)}"
            )
        rows_TI = input_TI.detach().reshape(-1, input_TI.shape[-1])
        if not _multiplies_as_is(rows_TI, self._upper_II.dtype):
            rows_TI = rows_TI.to(self._upper_II.dtype)
        for part_TI in [rows_TI] if rows_TI.is_cuda else rows_TI.split(CACHED_ROWS):
            add_half_product(self._upper_II, part_TI)
            self._add_vectors(part_TI)
        self._tokens += rows_TI.shape[0]

    def _add_vectors(self, rows_TI: Tensor) -> None:
        if rows_TI.is_cuda:
            self._abs_sum_I += rows_TI.abs().sum(0, dtype=self._upper_II.dtype)
            self._sum_I += rows_TI.sum(0, dtype=self._upper_II.dtype)
        else:
            add_sums(rows_TI.numpy(), self._abs_sum_I.numpy(), self._sum_I.numpy())

    def moments(self) -> InputMoments:
        """The sums so far, copied to the CPU: what is added later does not change them."""
        return self._moments(self._upper_II.to("cpu", copy=True))

    def finish(self) -> InputMoments:
        """The sums, on the CPU. Nothing can be added any more: there they are the accumulator's own, not a copy."""
        upper_II = self._upper_II
        del self._upper_II
        return self._moments(upper_II.to("cpu"))

    def _moments(self, gram_II: Tensor) -> InputMoments:
        _mirror(gram_II)
        dtype = gram_II.dtype
        abs_sum_I, sum_I = (vector_I.to("cpu", dtype, copy=True) for vector_I in (self._abs_sum_I, self._sum_I))
        return InputMoments(gram_II, abs_sum_I, sum_I, self._tokens)


def _mirror(gram_II: Tensor) -> None:
    """Make a matrix symmetric by its upper triangle, in place."""
    for start in range(0, len(gram_II), MIRRORED_ROWS):
        stop = start + MIRRORED_ROWS
        corner_BB = gram_II[start:stop, start:stop]
        corner_BB.copy_(corner_BB.triu() + corner_BB.triu(1).mT)
        gram_II[stop:, start:stop] = gram_II[start:stop, stop:].mT


def _multiplies_as_is(rows_TI: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies these rows exactly and sums in `dtype` without widening them first."""
    return rows_TI.is_cuda and rows_TI.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32
