"""Matrices that no method will change, reported after reading only one block of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from crosscal.errors import PlanError
from crosscal.models.sites import check_all, is_left
from crosscal.models.source import ModelSource
from crosscal.stages.moments import CachedMoments
from crosscal.stages.preflight import matrices_of
from crosscal.stages.solve_site import ASKED


def left_dense(source: ModelSource, cached: CachedMoments, leave_dense: Sequence[str] = ()) -> list[str]:
    """Return what no method will change, and why, e.g. `mlp.gate: a router (24 blocks)`.

    Raises `UnsupportedModel` for a model that cannot be calibrated, and `PlanError` for a pattern of `leave_dense` that
    names no matrix.
    """
    counts: Counter[tuple[str, str]] = Counter()
    unused = set(leave_dense)
    blocks = {source.block_name(block): found for block, found in enumerate(matrices_of(source, cached))}
    check_all(blocks, leave_dense)
    for name, found in blocks.items():
        counts.update((left.name, left.reason) for left in found.left_dense)
        solved = [matrix.name for site in found.sites for matrix in site.matrices]
        counts.update((each, ASKED) for each in solved if is_left(f"{name}.{each}", leave_dense))
        named = [f"{name}.{each}" for each in (*solved, *(left.name for left in found.left_dense))]
        unused -= {pattern for pattern in unused if any(is_left(each, [pattern]) for each in named)}
    if unused:
        raise PlanError("no matrix of a block has such a name", where="leave_dense", got=", ".join(sorted(unused)))
    return [f"{name}: {reason} ({count} block{'s' if count > 1 else ''})" for (name, reason), count in counts.items()]
