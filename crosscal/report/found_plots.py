"""Chart of a mixture search between two corpora: the losses on both, and the perplexities predicted from them.

The prediction takes log perplexity as linear in the mean held-out loss on the same corpus, through the dense model,
with loss 0, and the model of the chosen mixture; it therefore needs no other model. Measured points next to it show how
well this holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.evaluation import TEST, VALIDATION
from crosscal.report.figure import COLOURS, INK, drawing, legend_below, panels, svg_of
from crosscal.report.groups import GENERAL, SeedGroup

Point = tuple[float, float]
"""(value on the corpus of the x axis, value on the other)."""


@dataclass(frozen=True)
class _Estimate:
    """Perplexity = exp(base + rate * loss), per corpus."""

    split: str
    base: Point
    rate: Point

    def of(self, losses: Point) -> Point:
        x, y = (math.exp(b + r * loss) for b, r, loss in zip(self.base, self.rate, losses, strict=True))
        return x, y


def is_taken(tried: Mapping[str, Any], choice: Mapping[str, Any]) -> bool:
    """Return whether a candidate mixture is the chosen one."""
    return all(math.isclose(w, choice["weights"].get(name, 0.0), abs_tol=1e-9) for name, w in tried["weights"].items())


def found_chart(choice: Mapping[str, Any], groups: Sequence[SeedGroup]) -> str:
    """Plot a search between two corpora; the run's groups on mixtures of the two are the measured points."""
    across, up = sorted(choice["exponents"], key=lambda name: name != GENERAL)
    losses = [(one["losses"][across], one["losses"][up]) for one in choice["tried"]]
    words = [f"{one['weights'][up]:.3g}" for one in choice["tried"]]
    taken = [is_taken(one, choice) for one in choice["tried"]].index(True)
    own = next((group for group in groups if choice["variant"] in group.variants), None)
    estimate = _estimate(groups, own, losses[taken], across, up) if own else None
    with drawing(f"found {choice['variant']}"):
        figure, axes = panels(2 if estimate else 1, columns=2)
        _tried(axes[0], losses, words, taken, "solved")
        _level(axes[0], losses, losses[taken], float(choice["exponents"][across]))
        axes[0].set(xlabel=f"held-out loss, {across}", ylabel=f"held-out loss, {up}")
        axes[0].set_title(f"{choice['variant']}: weight of {up}")
        if estimate and own:
            _tried(axes[1], [estimate.of(each) for each in losses], words, taken, "estimated from losses")
            points = list(_measured(choice, groups, own, estimate.split, across, up))
            axes[1].plot(*zip(*points, strict=True), "x", color=COLOURS[3], label="measured")
            axes[1].set(xlabel=f"{across} perplexity", ylabel=f"{up} perplexity", title=f"{estimate.split} text")
        named = {handle.get_label(): handle for axis in axes for handle in axis.get_legend_handles_labels()[0]}
        legend_below(figure, list(named.values()))
        return svg_of(figure)


def _tried(axis: Any, points: Sequence[Point], words: Sequence[str], taken: int, label: str) -> None:
    axis.plot(*zip(*points, strict=True), marker="o", color=COLOURS[0], label=label)
    axis.plot(*points[taken], marker="*", markersize=13, color=COLOURS[1], linestyle="none", label="taken", zorder=3)
    for point, word in zip(points, words, strict=True):
        axis.annotate(word, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.margins(0.12)


def _level(axis: Any, points: Sequence[Point], taken: Point, exponent: float) -> None:
    """Contour of the chosen mixture's geometric mean: candidates below it have a smaller mean."""
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    if low <= 0 or high <= low:
        return
    x = [low * (high / low) ** (step / 40) for step in range(41)]
    y = [taken[1] * (taken[0] / each) ** (exponent / (1 - exponent)) for each in x]
    bounds = axis.get_ylim()
    look = {"color": INK, "alpha": 0.35, "linewidth": 1.2, "linestyle": (0, (1, 1.5))}
    axis.plot(x, y, **look, label="the same geometric mean")
    axis.set_ylim(bounds)


def _estimate(groups: Sequence[SeedGroup], own: SeedGroup, losses: Point, across: str, up: str) -> _Estimate | None:
    """On validation text if measured, else on test text; None if the dense or the chosen model has no perplexity."""
    dense = next((group for group in groups if group.is_dense), None)
    for split in (VALIDATION, TEST):
        before = [number.value for c in (across, up) if dense and (number := dense.perplexity(c, split))]
        after = [number.value for c in (across, up) if (number := own.perplexity(c, split))]
        if len(before) == len(after) == 2 and min(losses) > 0:
            base = (math.log(before[0]), math.log(before[1]))
            rate = ((math.log(after[0]) - base[0]) / losses[0], (math.log(after[1]) - base[1]) / losses[1])
            return _Estimate(split, base, rate)
    return None


def _measured(
    choice: Mapping[str, Any], groups: Sequence[SeedGroup], own: SeedGroup, split: str, across: str, up: str
) -> Iterator[Point]:
    """Models of the same recipe on mixtures of the two corpora, and candidates that were evaluated."""
    for group in groups:
        x, y = group.perplexity(across, split), group.perplexity(up, split)
        alike = (group.method, group.setting, group.upstream) == (own.method, own.setting, own.upstream)
        alike &= len(group.mixture) == 1 or group.trace_normalised == own.trace_normalised
        if x and y and alike and set(group.mixture) <= {across, up}:
            yield x.value, y.value
    for one in choice["tried"]:
        if split == VALIDATION and {across, up} <= set(one["perplexity"]):
            yield one["perplexity"][across], one["perplexity"][up]
