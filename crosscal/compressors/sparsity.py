"""Sparsity: the amount to remove, the selection of weights, and the pruned layer, whose mask later steps respect.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crosscal.compressors.selection import lowest, lowest_per_row
from crosscal.compressors.state import Dense, Layer
from crosscal.errors import UsageError


@dataclass(frozen=True)
class Sparsity:
    """Remove `fraction` of the weights, or, if `group` is set, all but `kept` of every `group` adjacent inputs."""

    fraction: float
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, value: float | str | Sparsity) -> Sparsity:
        """Parse 0.5 (removes half) or "2:4" (keeps 2 of every 4, as NVIDIA defines it). Raises `UsageError`."""
        if isinstance(value, Sparsity):
            return value
        match = re.fullmatch(r"(\d+):(\d+)", value.strip()) if isinstance(value, str) else None
        if match:
            kept, group = int(match[1]), int(match[2])
            if 0 <= kept <= group and group > 0:
                return cls(1 - kept / group, kept, group)
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
            return cls(float(value))
        raise UsageError(
            "not a sparsity",
            got=repr(value),
            do='Give the fraction removed (0 to 1), or n kept of m in quotes, such as "2:4".',
        )

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else f"{self.fraction:g}"

    def removed(self, weights: int) -> int:
        """Return how many of `weights` are removed: the nearest integer, halves to even."""
        return round(self.fraction * weights)

    def check(self, inputs: int, name: str) -> None:
        """Raise `UsageError` if the inputs do not divide into groups."""
        if self.group and inputs % self.group:
            raise UsageError(
                f"{self} needs a number of inputs divisible by {self.group}",
                where=name,
                got=f"{inputs}",
                do="Use a fraction for this model.",
            )

    def keep_OI(self, score_OI: Tensor, *, per: Literal["row", "matrix"], name: str = "layer") -> Tensor:
        """Return True where a weight is kept: exactly `removed` weights of the lowest scores are pruned, among equal
        scores the earlier (row-major)."""
        self.check(score_OI.shape[1], name)
        if self.group:
            grouped = score_OI.reshape(-1, self.group)
            return ~lowest_per_row(grouped, self.group - (self.kept or 0)).reshape(score_OI.shape)
        if per == "row":
            return ~lowest_per_row(score_OI, self.removed(score_OI.shape[1]))
        return ~lowest(score_OI, self.removed(score_OI.numel()))


def pruned(layer: Layer, keep_OI: Tensor, weight_OI: Tensor | None = None, *, damping: float | None = None) -> Layer:
    """Return the layer with the weights outside `keep_OI` set to 0. `weight_OI`: new values, by default unchanged.

    A weight that an earlier step removed scores 0 and stays removed. Without `damping` the recorded one stays.
    """
    keep_OI = keep_OI if layer.keep_OI is None else keep_OI & layer.keep_OI
    weight_OI = layer.base.weight_OI if weight_OI is None else weight_OI
    damping = layer.damping if damping is None else damping
    return layer.changed(Dense(torch.where(keep_OI, weight_OI, 0.0)), keep_OI=keep_OI, damping=damping)


def kept(layer: Layer) -> Tensor:
    """Return the mask of a layer; all True if nothing was pruned."""
    return torch.ones_like(layer.target_OI, dtype=torch.bool) if layer.keep_OI is None else layer.keep_OI
