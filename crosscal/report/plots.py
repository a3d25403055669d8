"""The charts of the report: groups of variants in, SVG text out (None if there is nothing to draw)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from crosscal.evaluation.summaries import pareto_front
from crosscal.report.curves import (
    MOST_ALPHAS,
    MOST_FLAVOURS,
    MOST_OTHERS,
    alphas_of,
    first_flavours,
    in_curves,
    lines_of,
    others_of,
)
from crosscal.report.figure import COLOURS, INK, MARKERS, drawing, legend_below, panels, plain_log_scale, svg_of
from crosscal.report.groups import GENERAL, Column, SeedGroup
from crosscal.report.left_dense import compared, marks_of
from crosscal.report.table import mixture_text

MOST_LEVELS = 5
MOST_ROWS = 24


def trade_off(groups: Sequence[SeedGroup], domain: str) -> str | None:
    """Plot general against domain perplexity: all levels together, then each level separately with alpha at its points.

    Every variant with both numbers is drawn; lines join general text, the domain and their mixtures.
    """
    dense = [group for group in groups if group.is_dense and _has_both(group, domain)]
    mixed = weighed(groups, domain)
    if not mixed:
        return None
    by_level = _by_level(mixed)
    levels = list(by_level)[:MOST_LEVELS]
    flavours, marks = first_flavours(mixed), marks_of(groups)
    with drawing(f"trade-off {domain}"):
        figure, axes = panels(1 + len(levels), columns=min(3, 1 + len(levels)))
        _trade_off_panel(axes[0], [*dense, *mixed], domain, flavours, marks, annotate=False)
        axes[0].set_title("All levels")
        plain_log_scale(axes[0].xaxis, axes[0].yaxis)
        for axis, level in zip(axes[1:], levels, strict=True):
            _trade_off_panel(axis, by_level[level], domain, flavours, marks, annotate=True)
            axis.set_title(level)
        legend_below(figure, [*_flavour_handles(flavours), *_front_handles(dense)])
        return svg_of(figure)


def _trade_off_panel(
    axis: Any,
    groups: Sequence[SeedGroup],
    domain: str,
    flavours: Sequence[str],
    marks: Mapping[str, str],
    *,
    annotate: bool,
) -> None:
    points = [_point(group, domain) for found in compared(groups).values() for group in found]
    if front := [points[index] for index in pareto_front(points)]:
        look = {"color": INK, "alpha": 0.35, "linewidth": 1.2, "linestyle": (0, (1, 1.5))}
        axis.step(*zip(*front, strict=True), where="post", **look)
    lines = lines_of(groups, lambda group: (group.flavour, (group.level, _line_key(group, domain))))
    for (flavour, _), line in lines.items():
        if flavour not in flavours:
            continue
        line = sorted(line, key=lambda group: group.alpha or 0.0)
        look = flavours.index(flavour)
        x, y = zip(*(_point(group, domain) for group in line), strict=True)
        x_sd, y_sd = ([_sd(group, corpus) for group in line] for corpus in (GENERAL, domain))
        axis.errorbar(x, y, y_sd, x_sd, marker=MARKERS[look], color=COLOURS[look], elinewidth=0.8)
        for group, point in zip(line, zip(x, y, strict=True), strict=True):
            words = [_mixture_word(group, domain)] * annotate + [marks.get(group.name, "")]
            _annotate(axis, point, ", ".join(filter(None, words)))
    for group in groups:
        if group.is_dense:
            axis.plot(*_point(group, domain), marker="*", markersize=13, color=INK, linestyle="none")
    axis.set(xlabel=f"{GENERAL} perplexity", ylabel=f"{domain} perplexity")
    axis.margins(0.12)


def _annotate(axis: Any, point: tuple[float, float], text: str) -> None:
    if text:
        axis.annotate(text, point, xytext=(5, 4), textcoords="offset points", fontsize=8)


def _line_key(group: SeedGroup, domain: str) -> str:
    """Empty for general text, the domain and their mixtures, which one line joins; any other mixture is on its own."""
    return "" if group.domains <= {domain} else mixture_text(group.mixture)


def _mixture_word(group: SeedGroup, domain: str) -> str:
    """Label of a point: alpha on a line of mixtures, the mixture itself elsewhere; empty without data."""
    if group.alpha is None:
        return ""
    return f"{group.alpha:g}" if group.domains <= {domain} else mixture_text(group.mixture)


def accuracies(groups: Sequence[SeedGroup], columns: Sequence[Column]) -> str | None:
    """Plot the accuracy of the first MOST_ROWS groups, one panel per task."""
    columns, marks = [column for column in columns if column[2] == "acc"], marks_of(groups)
    shown = [group for group in groups if any(column in group.numbers for column in columns)][:MOST_ROWS]
    if not shown:
        return None
    with drawing("accuracies"):
        figure, axes = panels(len(columns), columns=min(3, len(columns)), height=0.9 + 0.19 * len(shown))
        for position, (axis, column) in enumerate(zip(axes, columns, strict=True)):
            for row, group in enumerate(shown):
                if number := group.numbers.get(column):
                    colour = INK if group.is_dense else COLOURS[0]
                    error = None if number.error is None else 100 * number.error
                    axis.errorbar(100 * number.value, row, xerr=error, marker="o", color=colour, elinewidth=1)
            labels = [_labelled(group, marks) for group in shown] if position % min(3, len(columns)) == 0 else []
            axis.set(title=column[0], xlabel="accuracy, %", yticks=range(len(shown)), ylim=(len(shown) - 0.5, -0.5))
            axis.set_yticklabels(labels or [""] * len(shown))
        return svg_of(figure)


def _labelled(group: SeedGroup, marks: Mapping[str, str]) -> str:
    return f"{group.name} ({marks[group.name]})" if group.name in marks else group.name


def left_out(groups: Sequence[SeedGroup], domain: str) -> str:
    """Return a sentence on what the charts of one domain omit; empty if they show everything."""
    mixed = weighed(groups, domain)
    drawn = in_curves(groups, domain)
    counts = (
        ("levels by themselves", MOST_LEVELS, len(_by_level(mixed))),
        ("methods", MOST_FLAVOURS, len({group.flavour for group in mixed})),
        ("values of α in the curves", MOST_ALPHAS, len(alphas_of(drawn, domain))),
        ("other mixtures in the curves", MOST_OTHERS, len(others_of(drawn, domain))),
    )
    parts = [f"{most} of {count} {what}" for what, most, count in counts if count > most]
    text = f"Drawn are only {', '.join(parts)}; the table has all. " if parts else ""
    compressed = [group for group in groups if not group.is_dense]
    unmeasured = len(compressed) - len(mixed)
    if mixed and unmeasured:
        text += f"{unmeasured} of {len(compressed)} variants lack one of the two perplexities."
    return text.strip()


def weighed(groups: Sequence[SeedGroup], domain: str) -> list[SeedGroup]:
    """Return the compressed groups that have both perplexities, whatever they were calibrated on."""
    return [group for group in groups if not group.is_dense and _has_both(group, domain)]


def _by_level(groups: Sequence[SeedGroup]) -> dict[str, list[SeedGroup]]:
    """The groups of each level that has at least two."""
    found: dict[str, list[SeedGroup]] = defaultdict(list)
    for group in groups:
        found[group.level].append(group)
    return {level: members for level, members in found.items() if len(members) > 1}


def _has_both(group: SeedGroup, domain: str) -> bool:
    return group.perplexity(GENERAL) is not None and group.perplexity(domain) is not None


def _point(group: SeedGroup, domain: str) -> tuple[float, float]:
    general, special = group.perplexity(GENERAL), group.perplexity(domain)
    assert general, "groups without a general perplexity are left out before"
    assert special, "groups without a domain perplexity are left out before"
    return general.value, special.value


def _sd(group: SeedGroup, corpus: str) -> float:
    """Standard deviation over seeds. One seed has none (NaN): variants share their windows, so the standard error over
    windows says little about their differences."""
    number = group.perplexity(corpus)
    return math.nan if number is None or number.error is None or number.seeds < 2 else number.error


def _flavour_handles(flavours: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], marker=MARKERS[i], color=COLOURS[i], label=flavour) for i, flavour in enumerate(flavours)]


def _front_handles(dense: Sequence[SeedGroup]) -> list[Any]:
    from matplotlib.lines import Line2D

    front = Line2D([], [], color=INK, alpha=0.35, linewidth=1.2, linestyle=(0, (1, 1.5)), label="Pareto front")
    star = Line2D([], [], color=INK, marker="*", markersize=11, linestyle="none", label="dense")
    return [front, star] if dense else [front]
