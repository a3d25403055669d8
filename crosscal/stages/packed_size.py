"""Predict, before anything is solved, how much of a variant will be stored packed and the size of its folder.

Shapes: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.models.sites import Matrices, MatrixRef
from crosscal.models.source import ModelSource
from crosscal.report.packed import share_text
from crosscal.stages.solve import IN_PARTS
from crosscal.stages.solve_site import LEFT_DENSE
from crosscal.variants import Variant

SHAPE_BYTES = 16
"""Two integers that hold the shape of a packed matrix."""


@dataclass(frozen=True)
class StoredSize:
    """How the block matrices of one model are stored with one grid."""

    reasons: Mapping[str, int]
    """Why parameters of the blocks' matrices are not packed -> number of parameters."""
    of_parameters: int
    saved_bytes: int
    """Bytes saved compared with storing them all dense."""


def stored_size(source: ModelSource, blocks: Sequence[Matrices], grid: tuple[int, int | None]) -> StoredSize:
    """Return the size for one grid. `blocks`: the matrices of each; `grid`: bits, and inputs per scale (None: all)."""
    bits, group_size = grid
    reasons: dict[str, int] = defaultdict(int)
    parameters, saved, itemsize = 0, 0.0, source.dtype.itemsize
    shapes = {name: tensor.shape for name, tensor in source.weights.model.named_parameters()}
    for number, found in enumerate(blocks):
        prefix = f"{source.block_name(number)}."
        matrices = {matrix: site.inputs for site in found.sites for matrix in site.matrices}
        why_dense = _reasons(source, prefix, matrices, group_size)
        for matrix, inputs in matrices.items():
            count = shapes[prefix + matrix.parameter].numel()
            count //= shapes[prefix + matrix.parameter][0] if matrix.expert is not None else 1
            scales = count // inputs * (inputs // group_size if group_size else 1)
            parameters += count
            if why := why_dense[matrix]:
                reasons[why] += count
            else:
                saved += count * itemsize - (count * bits / 8 + scales * itemsize + SHAPE_BYTES)
        for left in found.left_dense:
            count = shapes[prefix + left.parameter].numel()
            reasons[f"{LEFT_DENSE}: {left.reason}"] += count
            parameters += count
    return StoredSize(reasons, parameters, round(saved))


def stored(
    source: ModelSource, variants: Sequence[Variant], find_matrices: Callable[[], Sequence[Matrices]]
) -> list[dict[str, Any]]:
    """Return, for each grid that some variant stores: how much of the blocks stays dense and why, and the approximate
    size of the model. `find_matrices` returns the matrices of every block; called only if there is such a variant."""
    grids: dict[tuple[int, int | None], list[str]] = defaultdict(list)
    for variant in variants:
        if variant.grid is not None:
            grids[variant.grid].append(variant.name)
    matrices = find_matrices() if grids else []
    checkpoint = sum(source.weights.bytes_of(key) for key in source.weights.files)
    dtype, found = str(source.dtype).removeprefix("torch."), []
    for grid, names in grids.items():
        size = stored_size(source, matrices, grid)
        dense = share_text(size.reasons, size.of_parameters, dtype) or "all packed"
        found.append({"variants": names, "bytes": checkpoint - size.saved_bytes, "dense": dense})
    return found


def _reasons(
    source: ModelSource, prefix: str, matrices: Mapping[MatrixRef, int], group_size: int | None
) -> dict[MatrixRef, str]:
    why = {
        matrix: source.packing.why_dense(f"{prefix}{matrix.parameter}") if matrix.is_called else matrix.NOT_CALLED
        for matrix in matrices
    }
    misfits = {matrix for matrix, inputs in matrices.items() if group_size and inputs % group_size}
    why |= {m: f"{LEFT_DENSE}: group_size {group_size} does not divide its {matrices[m]} inputs" for m in misfits}
    stacks = {matrix.parameter.rpartition(".")[0] for matrix in matrices if matrix.expert is not None and why[matrix]}
    in_parts = {m for m in matrices if m.expert is not None and m.parameter.rpartition(".")[0] in stacks}
    return {matrix: why[matrix] or (IN_PARTS if matrix in in_parts else "") for matrix in matrices}
