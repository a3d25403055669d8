"""What a run will need, told before it starts: shapes of the blocks, bytes of memory and disk, tokens not yet read.

Estimates, from a skeleton on the meta device. Sites are exact where the model was calibrated before. Otherwise every
matrix of a module but the last is taken to share its input with those of equal width (q, k, v; gate, up), and the last
to read what the module made of it: exact for the Llama, GPT-2, OPT and NeoX families, within a third elsewhere.

Shapes: I inputs of a site, O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from crosscal.models import experts
from crosscal.models.blocks import find_blocks
from crosscal.models.sites import is_linear
from crosscal.models.source import ModelSource
from crosscal.stages.moments import Cached
from crosscal.store import Store

SUM_BYTES = 4
"""Moments are summed and solved in float32 (a float64 walk is not planned)."""
STORED_SHARE = 0.42
"""Of a full Gram matrix: its upper triangle in compressed byte planes (`crosscal.store.moments`); 0.35-0.45 seen."""


@dataclass(frozen=True)
class BlockShape:
    """One decoder block in numbers."""

    name: str
    sites: tuple[tuple[str, int], ...]
    """(name, I) of every input site."""
    parameters: int
    stored_bytes: int

    @property
    def gram_bytes(self) -> int:
        """Of one calibration set: Σ I² over the sites."""
        return sum(inputs * inputs for _, inputs in self.sites) * SUM_BYTES


def block_shapes(source: ModelSource, cached: Cached) -> list[BlockShape]:
    """Every block of a model, without reading a weight."""
    shapes = []
    for index, block in enumerate(find_blocks(source.weights.model)[1]):
        known = cached.sites(index)
        sites = [(site.name, site.inputs) for site in known] if known else list(_likely_sites(block))
        parameters = sum(parameter.numel() for parameter in block.parameters())
        stored_bytes = parameters * source.dtype.itemsize
        shapes.append(BlockShape(source.block_name(index), tuple(sites), parameters, stored_bytes))
    return shapes


def _likely_sites(block: nn.Module) -> Iterator[tuple[str, int]]:
    for parent_name, parent in block.named_modules():
        if experts.is_experts(parent):
            for part in (experts.up_name(parent), "down_proj"):
                shape = parent.get_parameter(part).shape
                inputs = shape[-2] if parent.is_transposed else shape[-1]
                yield from ((f"{parent_name}.{expert}.{part}", int(inputs)) for expert in range(shape[0]))
        linears = [(name, _inputs(module)) for name, module in parent.named_children() if is_linear(module)]
        widths: set[int] = set()
        for name, inputs in linears:
            is_last = name == linears[-1][0] and len(linears) > 1
            if is_last or inputs not in widths:
                yield f"{parent_name}.{name}".removeprefix("."), inputs
            widths.add(inputs)


def _inputs(linear: nn.Module) -> int:
    return int(linear.get_parameter("weight").shape[1 if isinstance(linear, nn.Linear) else 0])


def moments_bytes(shapes: Sequence[BlockShape], sets: int) -> int:
    """On disk, for so many calibration and held-out sets: about 0.42 · 4 bytes · Σ I² each."""
    return round(STORED_SHARE * sum(shape.gram_bytes for shape in shapes) * sets)


def reading_bytes(
    shapes: Sequence[BlockShape], *, outside: int, hidden: int, tokens: int, sets: int, itemsize: int
) -> int:
    """Memory of one pass over a model: hidden states of all `tokens`, and the larger of two moments.

    At first what lies outside the blocks (`outside` parameters) and one block; then two blocks, one being read ahead,
    with the Hessians of a block for every set.
    """
    block = max(shape.parameters for shape in shapes) * itemsize
    grams = max(shape.gram_bytes for shape in shapes) * sets
    return tokens * hidden * itemsize + max(outside * itemsize + block, 2 * block + grams)


def solving_bytes(shapes: Sequence[BlockShape], *, variants: int, sets: int) -> int:
    """Memory of solving one block: its weights and every variant's answer in float32, and one site's matrices.

    Of the widest site: the moments of every set and the Hessian, its factor, the held-out Hessian and a work copy.
    """
    block = max(shape.parameters for shape in shapes) * SUM_BYTES
    widest = max(inputs for shape in shapes for _, inputs in shape.sites)
    return block * (1 + 2 * variants) + widest * widest * SUM_BYTES * (sets + 4)


def stored_set(store: Store, wanted: Mapping[str, Any]) -> str | None:
    """The key of the calibration set whose provenance says all of this; None where none does."""
    stored = store.list("calibration")
    return next((a.key for a in stored if all(a.provenance.get(name) == value for name, value in wanted.items())), None)


def is_read(cached: Cached, calibration: str | None, blocks: int) -> bool:
    """Whether every block's moments of a calibration set are in the store."""
    return calibration is not None and all(cached.has(calibration, block) for block in range(blocks))


def existing_parent(path: Path) -> Path:
    """The nearest folder above that exists: whose disk a new folder will be on."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
