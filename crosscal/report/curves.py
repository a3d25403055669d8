"""Perplexity over the amount of compression: one line per method and mixture, as SVG text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crosscal.report.figure import COLOURS, INK, MARKERS, drawing, legend_below, panels, plain_log_scale, svg_of
from crosscal.report.groups import SeedGroup
from crosscal.report.headline import domains_of
from crosscal.report.left_dense import marks_of
from crosscal.report.table import mixture_text

MOST_FLAVOURS = 6
MOST_ALPHAS = 6
MOST_OTHERS = 4
"""Mixtures other than those of general text and the domain."""


def curves(groups: Sequence[SeedGroup], domain: str | None, corpora: Sequence[str], axis_name: str) -> str | None:
    """Plot each corpus's perplexity over `axis_name`, such as "sparsity" or "bits"; one line per method and mixture."""
    found = [group for group in in_curves(groups, domain) if group.amount(axis_name)]
    amounts = sorted({_value(group, axis_name) for group in found})
    if len(amounts) < 2:
        return None
    flavours, colours, marks = first_flavours(found), _mixture_colours(found, domain), marks_of(groups)
    lines = lines_of(found, lambda group: (group.flavour, (_label(group, domain), _others(group, axis_name))))
    dense = next((group for group in groups if group.is_dense), None)
    with drawing(f"{axis_name} {domain}"):
        figure, axes = panels(len(corpora), columns=min(3, len(corpora)))
        for axis, corpus in zip(axes, corpora, strict=True):
            for (flavour, (mixture, _)), line in lines.items():
                if flavour in flavours and mixture in colours:
                    look = {"marker": MARKERS[flavours.index(flavour)], "color": colours[mixture]}
                    _curve(axis, line, corpus, axis_name, look, marks)
            if dense and (number := dense.perplexity(corpus)):
                axis.axhline(number.value, color=INK, alpha=0.5, linestyle="--", linewidth=1)
            axis.set(title=corpus, xlabel=axis_name, ylabel="perplexity")
            plain_log_scale(axis.yaxis)
            axis.set_xticks(amounts)
        legend_below(figure, _handles(flavours, colours, dense is not None), columns=9)
        return svg_of(figure)


def _curve(
    axis: Any, line: Sequence[SeedGroup], corpus: str, axis_name: str, look: Mapping[str, str], marks: Mapping[str, str]
) -> None:
    """Join fractions by a line; n:m patterns are separate hollow markers, as they constrain more than a fraction."""
    for patterned in (False, True):
        measured = [
            (_value(group, axis_name), number.value, math.nan if number.error is None else number.error, group.name)
            for group in line
            if _is_pattern(group) == patterned and (number := group.perplexity(corpus))
        ]
        if measured:
            x, y, error, names = zip(*sorted(measured), strict=True)
            style = {"linestyle": "none", "markerfacecolor": "none"} if patterned else {}
            axis.errorbar(x, y, yerr=error, elinewidth=0.8, **look, **style)
            for point in zip(x, y, names, strict=True):
                if text := marks.get(point[2]):
                    axis.annotate(text, point[:2], xytext=(5, 4), textcoords="offset points", fontsize=7)


def in_curves(groups: Sequence[SeedGroup], domain: str | None) -> list[SeedGroup]:
    """Return the compressed groups calibrated on no other domain, but on general text, `domain` or untested corpora."""
    others = set(domains_of(groups)) - {domain}
    return [group for group in groups if not group.is_dense and not group.domains & others]


def alphas_of(groups: Sequence[SeedGroup], domain: str | None) -> list[float]:
    """Return the weights of the domain in its mixtures with general text alone."""
    return sorted({group.alpha for group in groups if group.alpha is not None and _is_plain(group, domain)})


def others_of(groups: Sequence[SeedGroup], domain: str | None) -> list[str]:
    return list(dict.fromkeys(mixture_text(group.mixture) for group in groups if not _is_plain(group, domain)))


def first_flavours(groups: Sequence[SeedGroup]) -> list[str]:
    return list(dict.fromkeys(group.flavour for group in groups))[:MOST_FLAVOURS]


def lines_of(
    groups: Sequence[SeedGroup], key: Callable[[SeedGroup], tuple[str, Any]]
) -> dict[tuple[str, Any], list[SeedGroup]]:
    """Return the compressed groups that one line joins, by flavour and what else is constant along it."""
    lines: dict[tuple[str, Any], list[SeedGroup]] = defaultdict(list)
    for group in groups:
        if not group.is_dense:
            lines[key(group)].append(group)
    return lines


def _is_plain(group: SeedGroup, domain: str | None) -> bool:
    return group.domains <= ({domain} if domain else set())


def _label(group: SeedGroup, domain: str | None) -> str:
    if group.alpha is None:
        return "no data"
    return f"α = {group.alpha:g}" if domain and _is_plain(group, domain) else mixture_text(group.mixture)


def _mixture_colours(groups: Sequence[SeedGroup], domain: str | None) -> dict[str, str]:
    """Label -> colour: at most MOST_ALPHAS alphas, including the smallest and largest, then other mixtures."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("alpha", [COLOURS[0], COLOURS[2], COLOURS[1]])
    alphas = alphas_of(groups, domain) if domain else []
    if len(alphas) > MOST_ALPHAS:
        alphas = [alphas[round(i * (len(alphas) - 1) / (MOST_ALPHAS - 1))] for i in range(MOST_ALPHAS)]
    found = {"no data": COLOURS[-1]} if any(group.alpha is None for group in groups) else {}
    found |= {f"α = {alpha:g}": to_hex(ramp(alpha)) for alpha in alphas}
    labels = dict.fromkeys(_label(group, domain) for group in groups)
    others = [label for label in labels if label not in found and not label.startswith("α = ")]
    return found | dict(zip(others[:MOST_OTHERS], COLOURS[3:], strict=False))


def _value(group: SeedGroup, axis_name: str) -> float:
    amount = group.amount(axis_name)
    return math.nan if amount is None else amount["value"]


def _others(group: SeedGroup, axis_name: str) -> str:
    """The amounts on other axes, which are the same along one line."""
    return ", ".join(amount["text"] for amount in group.amounts if amount["axis"] != axis_name)


def _is_pattern(group: SeedGroup) -> bool:
    return any(amount["is_pattern"] for amount in group.amounts)


def _handles(flavours: Sequence[str], colours: Mapping[str, str], dense: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker=m, color=INK, ls="none", label=f) for f, m in zip(flavours, MARKERS, strict=False)]
    handles += [Line2D([], [], color=colour, label=label) for label, colour in colours.items()]
    if dense:
        handles.append(Line2D([], [], color=INK, alpha=0.5, linestyle="--", linewidth=1, label="dense"))
    return handles
