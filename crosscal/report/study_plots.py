"""A study's differences over the mixture, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crosscal.evaluation import PERPLEXITY
from crosscal.report.curves import first_flavours
from crosscal.report.figure import COLOURS, INK, MARKERS, drawing, legend_below, panels, svg_of
from crosscal.report.groups import GENERAL, TEST, SeedGroup
from crosscal.report.plots import MOST_LEVELS
from crosscal.report.rows import StudyRow
from crosscal.report.study_table import change

LINES = {"domain": "-", "general": "--"}


def changes_by_alpha(groups: Sequence[SeedGroup], rows: Sequence[StudyRow], domain: str) -> str | None:
    """Plot the change of perplexity against general text alone over alpha, one panel per level: domain text and general
    text, with 95 % intervals. None if no mixture was compared with general text alone."""
    changes = {
        (row.variant, row.corpus_or_task): row
        for row in rows
        if row.rule == GENERAL and row.metric == PERPLEXITY and row.split == TEST
    }
    mixed = [group for group in groups if group.alpha is not None and group.domains <= {domain}]
    compared = [group for group in mixed if (group.name, domain) in changes]
    levels = list(dict.fromkeys(group.level for group in compared))[:MOST_LEVELS]
    if not levels:
        return None
    flavours = first_flavours(compared)
    with drawing(f"changes {domain}"):
        figure, axes = panels(len(levels), columns=min(3, len(levels)))
        for axis, level in zip(axes, levels, strict=True):
            for flavour in flavours:
                line = [group for group in compared if (group.level, group.flavour) == (level, flavour)]
                look = flavours.index(flavour)
                for corpus, style in ((domain, LINES["domain"]), (GENERAL, LINES["general"])):
                    _line(axis, line, corpus, changes, {"marker": MARKERS[look], "color": COLOURS[look], "ls": style})
            axis.axhline(0, color=INK, alpha=0.5, linewidth=1)
            axis.set(title=level, xlabel=f"α, weight of {domain}", ylabel="change of perplexity, %")
        legend_below(figure, _handles(flavours, domain))
        return svg_of(figure)


def _line(
    axis: Any,
    line: Sequence[SeedGroup],
    corpus: str,
    changes: Mapping[tuple[str, str], StudyRow],
    look: Mapping[str, str],
) -> None:
    """Starts at general text alone, the baseline of the changes."""
    points = [(0.0, 0.0, 0.0, 0.0)]
    for group in line:
        row = changes.get((group.name, corpus))
        if row is not None and group.alpha is not None:
            middle = change(row, row.value)
            low, high = (change(row, end) for end in row.interval or (row.value, row.value))
            points.append((group.alpha, middle, middle - low, high - middle))
    if len(points) > 1:
        x, y, below, above = zip(*sorted(points), strict=True)
        axis.errorbar(x, y, yerr=(below, above), elinewidth=0.8, **look)


def _handles(flavours: Sequence[str], domain: str) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=MARKERS[number], color=COLOURS[number], ls="none", label=flavour)
        for number, flavour in enumerate(flavours)
    ]
    named = {domain: LINES["domain"], GENERAL: LINES["general"]}
    return handles + [Line2D([], [], color=INK, ls=style, label=f"on {corpus} text") for corpus, style in named.items()]
