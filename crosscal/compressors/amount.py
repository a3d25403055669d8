"""The amount of compression of a step (sparsity, bits), by which variants are named, compared and plotted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Amount:
    axis: str
    """The quantity, which is also the name of its setting: `sparsity`, `bits`."""
    value: float
    text: str
    """"50 % sparsity", "4 bits g128". Variants with equal text are comparable."""
    label: str
    """Short form for names: "50", "w4g128"."""
    said_by: tuple[str, ...]
    """The settings that the label encodes."""
    is_pattern: bool = False
    """True for n:m, a stronger constraint than the same fraction."""

    def as_row(self) -> dict[str, Any]:
        """Return the fields that result rows store."""
        return {"axis": self.axis, "value": self.value, "text": self.text, "is_pattern": self.is_pattern}


def amounts_of(step: Any) -> tuple[Amount, ...]:
    """Return the step's own `amounts` if it has them, else its sparsity and the grid of its integers."""
    if (own := getattr(step, "amounts", None)) is not None:
        return own
    found = []
    if (sparsity := getattr(step, "sparsity", None)) is not None:
        how_much, label = str(sparsity), f"{sparsity.kept}of{sparsity.group}"
        if not sparsity.group:
            how_much, label = f"{100 * sparsity.fraction:g} %", f"{100 * sparsity.fraction:g}"
        text, is_pattern = f"{how_much} sparsity", sparsity.group is not None
        found.append(Amount("sparsity", sparsity.fraction, text, label, ("sparsity",), is_pattern))
    if (grid := grid_of([step])) is not None:
        bits, group_size = grid
        suffix = f"g{group_size}" if group_size else ""
        text = f"{bits} bits {suffix}".rstrip()
        found.append(Amount("bits", bits, text, f"w{bits}{suffix}", ("bits", "group_size")))
    return tuple(found)


def grid_of(steps: Sequence[Any]) -> tuple[int, int | None] | None:
    """Return (bits, inputs per scale) of a recipe's integers; None if no step rounds, or if the last one that does
    leaves a form that cannot be packed."""
    rounding = [step for step in steps if step.kind == "quantize"]
    is_packed = bool(rounding) and getattr(rounding[-1], "is_packed", True)
    return (rounding[-1].bits, rounding[-1].group_size) if is_packed else None


def is_written_dense(steps: Sequence[Any]) -> bool:
    """True if no checkpoint format can hold a recipe's integers, so that they are written in the model's dtype."""
    return grid_of(steps) is None and any(step.kind == "quantize" for step in steps)
