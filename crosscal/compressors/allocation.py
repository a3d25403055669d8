"""Sparsity allocation: choose the sparsity of each layer so that the model as a whole reaches a target sparsity.

An allocator is a barrier between two phases of a recipe. `summarise` maps one block to one number per layer and can run
on any machine. `allocate` is pure: from the numbers of all layers it computes the fraction removed from each. The steps
after the allocator use these sparsities instead of their own.

Shapes: O outputs, I inputs, L layers, N weights of a unit (a block or a layer).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

from crosscal.compressors.sparsity import Sparsity
from crosscal.compressors.state import Layer, Site, Statistic
from crosscal.errors import UsageError

ALLOCATE = "allocate"
Unit = Literal["block", "layer"]
SparsitiesOf = Callable[[float], Mapping[str, float]]
"""Maps a target sparsity to the fraction removed from each layer, by layer name."""


class Allocator(Protocol):
    """A step that chooses the sparsity of each layer."""

    kind: ClassVar = ALLOCATE
    needs: ClassVar[frozenset[Statistic]]
    version: ClassVar[int]

    def summarise(self, block: Sequence[Site]) -> dict[str, float]:
        """Return one number per layer of a block, from its dense weights and the statistics in `needs`."""
        ...

    def allocate(self, summary: Mapping[str, float], target: float, weights: Mapping[str, int]) -> dict[str, float]:
        """Return the fraction removed from each layer; its mean, weighted by the layers' `weights`, is `target`.

        A method that counts over a whole matrix then removes round(fraction · weights) of each, so the total is within
        half a weight per layer of target · weights; a method that counts per row, within half a weight per row.
        """
        ...


def summarised(allocator: Any, block: Sequence[Site]) -> dict[str, float]:
    """Call `summarise` with only the statistics that the allocator declares in `needs`."""
    return allocator.summarise(
        [dataclasses.replace(site, statistics=site.statistics.only(allocator.needs)) for site in block]
    )


def sparsities_over(allocator: Any, blocks: Sequence[Sequence[Site]]) -> SparsitiesOf:
    """Run an allocator on all blocks of a model; the result maps a target to the sparsity of each layer."""
    layers = [layer for block in blocks for site in block for layer in site.layers]
    weights = {layer.name: layer.target_OI.numel() for layer in layers}
    summary = {name: number for block in blocks for name, number in summarised(allocator, block).items()}
    return lambda target: allocator.allocate(summary, target, weights)


def of_units(block: Sequence[Site], per: Unit, number: Callable[[list[Tensor]], float]) -> dict[str, float]:
    """Apply `number` to the scores |W_oi| √H_ii (Wanda's) of a block's matrices.

    Per block the scores are joined first, as in the papers' code, and every layer gets the same number.
    """
    scores = {
        layer.name: layer.target_OI.abs() * site.statistics.square_I.sqrt() for site in block for layer in site.layers
    }
    if per == "layer":
        return {name: number([score_OI]) for name, score_OI in scores.items()}
    return dict.fromkeys(scores, number(list(scores.values()))) if scores else {}


def check_spread(spread: float, per: str) -> None:
    """Raise `UsageError` if `spread` is outside [0, 1] or `per` is unknown."""
    if not 0 <= spread <= 1 or per not in ("block", "layer"):
        raise UsageError("`spread` is 0 to 1, `per` is block or layer", got=f"spread {spread}, per {per}")


def spread_out(
    importance: Mapping[str, float], target: float, weights: Mapping[str, int], spread: float
) -> dict[str, float]:
    """Return a lower sparsity for more important layers, over a range of 2 · spread around the target:

        x_l = 2 · spread · (importance_l - min) / (max - min),   sparsity_l = target - (x_l - mean of x)

    The mean is weighted by the number of weights; for blocks of equal size it is the papers' mean over blocks. If a
    value leaves [0, 1], the other layers take the rest (`filled`). Without a spread, or if all layers are equally
    important, every layer gets the target.
    """
    if not importance:
        return {}
    found_L = np.array(list(importance.values()), dtype=np.float64)
    weight_L = np.array([weights[name] for name in importance], dtype=np.float64)
    width = np.ptp(found_L)
    share_L = (found_L - found_L.min()) / width * (2 * spread) if width > 0 else np.zeros_like(found_L)
    wanted_L = target - (share_L - np.average(share_L, weights=weight_L))
    return dict(zip(importance, filled(wanted_L, weight_L, target).tolist(), strict=True))


def filled(wanted_L: np.ndarray, weight_L: np.ndarray, target: float) -> np.ndarray:
    """Shift all values by one constant t and clip them to [0, 1], so that the weighted mean is the target.

    The mean of min(max(wanted + t, 0), 1) is piecewise linear and increasing in t, with breakpoints where a layer
    reaches 0 or 1; t follows from the piece that contains the target. Values inside [0, 1] are returned unchanged.
    """
    if wanted_L.min() >= 0 and wanted_L.max() <= 1:
        return wanted_L

    def mean(move: float) -> float:
        return float(np.average(np.clip(wanted_L + move, 0, 1), weights=weight_L))

    edges = np.unique(np.concatenate([-wanted_L, 1 - wanted_L]))
    after = min(max(bisect.bisect_left(edges, target, key=mean), 1), len(edges) - 1)
    low, high = edges[after - 1], edges[after]
    part = (target - mean(low)) / (mean(high) - mean(low))
    return np.clip(wanted_L + low + part * (high - low), 0, 1)


def with_sparsities(step: Any, sparsities_of: SparsitiesOf, layers: Sequence[str]) -> Any:
    """Return the step with the sparsities allotted to these layers of one site; unchanged if it has no sparsity.

    A layer without an allotted sparsity keeps the step's own: its statistics cannot be read, and the solve reports
    that. Raises `UsageError` for n:m, which is the same in every layer.
    """
    sparsity = getattr(step, "sparsity", None)
    if sparsity is None:
        return step
    if sparsity.group:
        raise UsageError("n:m cannot vary by layer", got=str(sparsity), do="Use a fraction after an allocator.")
    sparsities = sparsities_of(sparsity.fraction)
    steps = tuple(
        dataclasses.replace(step, sparsity=Sparsity(sparsities.get(layer, sparsity.fraction))) for layer in layers
    )
    return steps[0] if len(set(steps)) == 1 else PerLayer(steps)


EXAMPLE = "For example `steps: [{method: owl}, {method: sparsegpt, sparsity: 0.7}]`."


def check_allocator(recipe: Sequence[tuple[str, Any]]) -> None:
    """Check the allocators of a recipe, given as (method name, step). Raises `UsageError`.

    An allocator uses the dense matrices, so it must come first, and only one is allowed. At least one later step must
    remove a fraction, and none may remove n:m, which is the same in every layer.
    """
    allocators = [number for number, (_, step) in enumerate(recipe) if step.kind == ALLOCATE]
    if not allocators:
        return
    name, last = recipe[allocators[0]][0], allocators[-1]
    if last:
        what = f"{recipe[last][0]} uses the dense matrices: it must be the first step, and the only allocator"
        raise UsageError(what, got=" + ".join(method for method, _ in recipe), do=EXAMPLE)
    removed = [sparsity for _, step in recipe if (sparsity := getattr(step, "sparsity", None)) is not None]
    if not removed:
        raise UsageError(f"{name} distributes a sparsity, but no later step has one", do=EXAMPLE)
    for sparsity in removed:
        if sparsity.group:
            what = f"{name} cannot distribute n:m, which is the same in every layer"
            raise UsageError(what, got=str(sparsity), do=f"Give a fraction, or leave {name} out.")


@dataclass(frozen=True)
class PerLayer:
    """A step with separate settings for each layer of a site. Layers with equal settings are solved together, and all
    share what is derived from the site's statistics."""

    steps: tuple[Any, ...]

    @property
    def kind(self) -> str:
        return self.steps[0].kind

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.steps[0].needs

    @property
    def version(self) -> int:
        return self.steps[0].version

    def __call__(self, site: Site) -> Site:
        done: dict[str, Layer] = {}
        for step in dict.fromkeys(self.steps):
            own = tuple(layer for layer, its in zip(site.layers, self.steps, strict=True) if its == step)
            done |= {layer.name: layer for layer in step(dataclasses.replace(site, layers=own)).layers}
        return site.each(lambda layer: done[layer.name])
