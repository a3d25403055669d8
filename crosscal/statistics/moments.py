"""Input moments: the sums over tokens that every layer-wise method starts from.

Shapes: T tokens, I inputs of the site. Stored are sums, never means: `a + b` covers exactly two disjoint sets of
tokens, so shards, corpus versions and machines merge by addition.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crosscal.errors import EmptyStatistics, NotFinite, StatisticsError
from crosscal.statistics.half_product import add_half_product, add_product, strips
from crosscal.statistics.numba_sums import add_sums
from crosscal.statistics.statistic import EVERY, OF_TWO_STREAMS, VECTORS, Statistic

CACHED_ROWS = 512  # multiplied and summed at a time on a CPU, while they are in its caches
MIRRORED_ROWS = 128  # mirrored at a time: a block and its transpose fit the cache


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Sums over the tokens x that reached one input site: all statistics, or the requested ones."""

    sums: Mapping[Statistic, Tensor]
    tokens: int
    """How many tokens were summed."""
    weighted_tokens: float | None = None
    """The sum of the tokens' weights; None if every token has weight 1."""

    @classmethod
    def of(cls, input_TI: Tensor) -> InputMoments:
        """Return the moments of the rows of one matrix, summed in its own precision or float32, whichever is wider."""
        accumulator = MomentsAccumulator(
            input_TI.shape[-1], dtype=torch.promote_types(input_TI.dtype, torch.float32), device=input_TI.device
        )
        accumulator.add(input_TI)
        return accumulator.moments()

    @classmethod
    def zero(
        cls, inputs: int, dtype: torch.dtype = torch.float32, wanted: Collection[Statistic] = EVERY
    ) -> InputMoments:
        """Return the neutral element of `+` for moments with these sums."""
        return cls({which: which.zeros(inputs, dtype) for which in Statistic if which in wanted}, 0)

    def __add__(self, other: InputMoments) -> InputMoments:
        """Return the moments of both sets of tokens. Raises `StatisticsError` if numbers of inputs or sums differ."""
        if self.inputs != other.inputs:
            raise StatisticsError(
                "moments of different sites cannot be added", got=f"{self.inputs} and {other.inputs} inputs"
            )
        if self.sums.keys() != other.sums.keys():
            raise StatisticsError("different sums cannot be added", got=f"{list(self.sums)} and {list(other.sums)}")
        return InputMoments(
            {which: mine + other[which] for which, mine in self.sums.items()},
            self.tokens + other.tokens,
            None if self.weighted_tokens is None is other.weighted_tokens else self.mass + other.mass,
        )

    def weighted(self, weight: float) -> InputMoments:
        """Return the sums with every token counted `weight` times; `a.weighted(w) + b` keeps the weights."""
        if weight == 1.0:
            return self
        return InputMoments({w: each * weight for w, each in self.sums.items()}, self.tokens, self.mass * weight)

    def __getitem__(self, which: Statistic) -> Tensor:
        """Return a sum; do not modify it. Σ x² is the diagonal of Σ x xᵀ if it was not summed separately, as in stores
        of earlier versions. Raises `StatisticsError` for a missing sum."""
        if which in self.sums:
            return self.sums[which]
        if which is Statistic.SQUARE_SUM and Statistic.GRAM in self.sums:
            return self.sums[Statistic.GRAM].diagonal()
        raise StatisticsError("a statistic was not summed", got=which)

    def only(self, wanted: Collection[Statistic]) -> InputMoments:
        """Restrict to some of the sums. Raises `StatisticsError` for a missing one."""
        return replace(self, sums={which: self[which] for which in Statistic if which in wanted})

    @property
    def gram_II(self) -> Tensor:
        """Σ x xᵀ, symmetric."""
        return self[Statistic.GRAM]

    @property
    def abs_sum_I(self) -> Tensor:
        """Σ |x|."""
        return self[Statistic.ABS_SUM]

    @property
    def sum_I(self) -> Tensor:
        """Σ x."""
        return self[Statistic.SUM]

    @property
    def mass(self) -> float:
        """Denominator of the means: the sum of the tokens' weights, their number if unweighted."""
        return self.tokens if self.weighted_tokens is None else self.weighted_tokens

    @property
    def inputs(self) -> int:
        return len(next(iter(self.sums.values())))

    def hessian_II(self, name: str = "moments") -> Tensor:
        """Return H = Σ x xᵀ / mass, the second moment per token. Raises `EmptyStatistics`, `NotFinite`."""
        self.check(name)
        return self.gram_II / self.mass

    def check(self, name: str = "moments") -> None:
        """Raise `EmptyStatistics` or `NotFinite` if these sums give no Hessian."""
        check_sum(Statistic.GRAM, self.gram_II, self.tokens, name)

    @property
    def mean_abs_I(self) -> Tensor:
        """Σ |x| / mass; zero without tokens."""
        return self.abs_sum_I / (self.mass or 1)


def check_sum(which: Statistic, sum_: Tensor, tokens: int, name: str) -> None:
    """Raise `EmptyStatistics` without tokens, `NotFinite` for a sum that is not finite."""
    if tokens == 0:
        raise EmptyStatistics(
            "no calibration token reached this input",
            where=name,
            do="Use more windows; an expert may never be selected.",
        )
    if not torch.isfinite(which.finite_part(sum_)).all():
        raise NotFinite("the calibration inputs were not finite", where=name, do="Calibrate in float32 or bfloat16.")


class MomentsAccumulator:
    """Accumulates the moments of a stream of inputs: the vectors, and if wanted one triangle of the Gram matrix.

    If any of `OF_TWO_STREAMS` is wanted, all of them are summed, and every input must come with the dense model's input
    for the same tokens.

    On a GPU, half-precision inputs are multiplied without conversion and summed in float32; otherwise inputs are
    converted to `dtype` first. The vectors are summed in `dtype` over 64 rows (on a GPU a batch), in float64 from there
    on, and returned in `dtype`.
    """

    def __init__(
        self,
        inputs: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        wanted: Collection[Statistic] = EVERY,
    ) -> None:
        self._inputs, self._dtype = inputs, dtype
        self._upper_II = Statistic.GRAM.zeros(inputs, dtype, device) if Statistic.GRAM in wanted else None
        self._cross_II = self._drift_II = None
        if OF_TWO_STREAMS & set(wanted):
            self._cross_II = Statistic.CROSS.zeros(inputs, dtype, device)
            self._drift_II = Statistic.DRIFT.zeros(inputs, dtype, device)
        self._vectors = {which: which.zeros(inputs, torch.float64, device) for which in VECTORS}
        self._tokens = 0

    @property
    def strips(self) -> Sequence[slice]:
        """Row ranges of the matrices that can be added to independently; one on a GPU, and without a matrix."""
        matrix_II = self._cross_II if self._upper_II is None else self._upper_II
        in_strips = matrix_II is not None and not matrix_II.is_cuda
        return strips(self._inputs) if in_strips else [slice(0, self._inputs)]

    def add(self, input_TI: Tensor, dense_TI: Tensor | None = None) -> None:
        """Add the rows of a matrix (any leading shape is flattened to tokens), with the dense model's rows for the same
        tokens if two streams are summed. Raises `StatisticsError` for a wrong width, and for dense inputs that are
        missing, unexpected or of another shape. On a CPU the sums are bit-identical for any number of torch's threads
        if BLAS uses one (`BLAS.one_thread`)."""
        for strip in self.strips:
            self.add_strip(input_TI, strip, dense_TI)

    def add_strip(self, input_TI: Tensor, strip: slice, dense_TI: Tensor | None = None) -> None:
        """Add to one strip only; call once for every strip. Other threads may add to other strips concurrently."""
        if input_TI.shape[-1] != self._inputs:
            raise StatisticsError("inputs of another width", got=f"{input_TI.shape[-1]} instead of {self._inputs}")
        rows_TI = self._rows(input_TI)
        for part_TI in _in_caches(rows_TI):
            if self._upper_II is not None:
                add_half_product(self._upper_II, part_TI, strip)
            if strip.start == 0:
                self._add_vectors(part_TI)
        self._add_streams(rows_TI, input_TI.shape, dense_TI, strip)
        if strip.start == 0:
            self._tokens += rows_TI.shape[0]

    def _rows(self, input_TI: Tensor) -> Tensor:
        rows_TI = input_TI.detach().reshape(-1, input_TI.shape[-1])
        return rows_TI if _multiplies_as_is(rows_TI, self._dtype) else rows_TI.to(self._dtype)

    def _add_streams(self, rows_TI: Tensor, shape: torch.Size, dense_TI: Tensor | None, strip: slice) -> None:
        if (dense_TI is None) != (self._cross_II is None) or (dense_TI is not None and dense_TI.shape != shape):
            got = "none" if dense_TI is None else str(tuple(dense_TI.shape))
            raise StatisticsError("inputs of both streams must be of the same tokens", got=f"{tuple(shape)} and {got}")
        if dense_TI is None or self._cross_II is None or self._drift_II is None:
            return
        for part_TI, dense_part_TI in zip(_in_caches(rows_TI), _in_caches(self._rows(dense_TI)), strict=True):
            add_product(self._cross_II, dense_part_TI, part_TI, strip)
            add_half_product(self._drift_II, dense_part_TI.to(self._dtype) - part_TI.to(self._dtype), strip)

    def _add_vectors(self, rows_TI: Tensor) -> None:
        if rows_TI.is_cuda:
            for which, total_I in self._vectors.items():
                assert which.of_each is not None
                total_I += which.of_each(rows_TI.to(self._dtype)).sum(0)
        else:
            add_sums(rows_TI.numpy(), *(self._vectors[which].numpy() for which in VECTORS))

    def moments(self) -> InputMoments:
        """Return the sums so far, copied to the CPU: later additions do not change them."""
        return self._moments({which: matrix_II.clone() for which, matrix_II in self._matrices().items()})

    def finish(self) -> InputMoments:
        """Return the sums on the CPU, not copied if accumulated there. Nothing can be added afterwards."""
        matrices = self._matrices()
        del self._upper_II, self._cross_II, self._drift_II
        return self._moments(matrices)

    def _matrices(self) -> dict[Statistic, Tensor]:
        """The accumulated matrices; of symmetric ones the upper triangle."""
        held = {Statistic.GRAM: self._upper_II, Statistic.CROSS: self._cross_II, Statistic.DRIFT: self._drift_II}
        return {which: matrix_II for which, matrix_II in held.items() if matrix_II is not None}

    def _moments(self, matrices: dict[Statistic, Tensor]) -> InputMoments:
        sums = {}
        for which in list(matrices):
            matrix_II = matrices.pop(which)  # released one by one
            if which.is_symmetric:
                _mirror(matrix_II)  # before the transfer: on a GPU this pass runs in GPU memory
            sums[which] = matrix_II.to("cpu")
        sums |= {which: total_I.to("cpu", self._dtype, copy=True) for which, total_I in self._vectors.items()}
        return InputMoments(sums, self._tokens)


def _mirror(gram_II: Tensor) -> None:
    """Copy the upper triangle to the lower one, in place."""
    for start in range(0, len(gram_II), MIRRORED_ROWS):
        stop = start + MIRRORED_ROWS
        corner_BB = gram_II[start:stop, start:stop]
        corner_BB.copy_(corner_BB.triu() + corner_BB.triu(1).mT)
        gram_II[stop:, start:stop] = gram_II[start:stop, stop:].mT


def _in_caches(rows_TI: Tensor) -> Sequence[Tensor]:
    return [rows_TI] if rows_TI.is_cuda else rows_TI.split(CACHED_ROWS)


def _multiplies_as_is(rows_TI: Tensor, dtype: torch.dtype) -> bool:
    """True if the device multiplies these rows exactly and sums in `dtype` without converting them first."""
    return rows_TI.is_cuda and rows_TI.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32
