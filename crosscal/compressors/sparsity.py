"""How much to remove, exactly which, and what that leaves behind: weights at 0, and the mask that later steps respect.

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
    """`fraction` of the weights removed, or, when `group` is set, all but `kept` of every `group` neighbouring
    inputs."""

    fraction: float
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, value: float | str | Sparsity) -> Sparsity:
        """0.5 removes half; "2:4" keeps 2 of every 4 (NVIDIA's meaning). Raises `UsageError`."""
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
        """How many of so many weights go: the nearest integer, halves to even."""
        return round(self.fraction * weights)

    def check(self, inputs: int, name: str) -> None:
        """Raises `UsageError` when the inputs do not divide into groups."""
        if self.group and inputs % self.group:
            raise UsageError(
                f"{self} needs a number of inputs divisible by {self.group}",
                where=name,
                got=f"{inputs}",
                do="Use a fraction for this model.",
            )

    def keep_OI(self, score_OI: Tensor, *, per: Literal["row", "matrix"], name: str = "layer") -> Tensor:
        """True where a weight survives: the lowest scores go, exactly `removed` of them; among equals the earlier
        (row-major) goes."""
        self.check(score_OI.shape[1], name)
        if self.group:
            grouped = score_OI.reshape(-1, self.group)
            return ~lowest_per_row(grouped, self.group - (self.kept or 0)).reshape(score_OI.shape)
        if per == "row":
            return ~lowest_per_row(score_OI, self.removed(score_OI.shape[1]))
        return ~lowest(score_OI, self.removed(score_OI.numel()))


def pruned(layer: Layer, keep_OI: Tensor, weight_OI: Tensor | None = None, *, damping: float | None = None) -> Layer:
    """The layer with the other weights 0; `weight_OI`: what the survivors are now, by default what they were.

    A weight that an earlier step removed has the score 0 and stays removed.
    """
    keep_OI = keep_OI if layer.keep_OI is None else keep_OI & layer.keep_OI
    weight_OI = layer.base.weight_OI if weight_OI is None else weight_OI
    return layer.changed(Dense(torch.where(keep_OI, weight_OI, 0.0)), keep_OI=keep_OI, damping=damping)


def kept(layer: Layer) -> Tensor:
    """The mask of a layer; all True where nothing was pruned."""
    return torch.ones_like(layer.target_OI, dtype=torch.bool) if layer.keep_OI is None else layer.keep_OI
