"""The charts of the report: groups of variants in, SVG text out (None where there is nothing to draw)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from crosscal.evaluation.summaries import pareto_front
from crosscal.report.figure import COLOURS, INK, MARKERS, drawing, legend_below, panels, plain_log_scale, svg_of
from crosscal.report.groups import GENERAL, Column, Group

MOST_LEVELS = 5
MOST_FLAVOURS = 6
MOST_ALPHAS = 6
MOST_ROWS = 24


def trade_off(groups: Sequence[Group], domain: str) -> str | None:
    """General against domain perplexity: all levels together, then each level by itself with alpha at its points."""
    dense = [group for group in groups if group.is_dense and _has_both(group, domain)]
    mixed = [group for group in mixed_with(groups, domain) if _has_both(group, domain)]
    if not mixed:
        return None
    by_level = _by_level(mixed)
    levels = list(by_level)[:MOST_LEVELS]
    flavours = _first_flavours(mixed)
    with drawing(f"trade-off {domain}"):
        figure, axes = panels(1 + len(levels), columns=min(3, 1 + len(levels)))
        _trade_off_panel(axes[0], [*dense, *mixed], domain, flavours, annotate=False)
        axes[0].set_title("All levels")
        plain_log_scale(axes[0].xaxis, axes[0].yaxis)
        for axis, level in zip(axes[1:], levels, strict=True):
            _trade_off_panel(axis, by_level[level], domain, flavours, annotate=True)
            axis.set_title(level)
        legend_below(figure, [*_flavour_handles(flavours), *_front_handles(dense)])
        return svg_of(figure)


def _trade_off_panel(
    axis: Any, groups: Sequence[Group], domain: str, flavours: Sequence[str], *, annotate: bool
) -> None:
    points = [_point(group, domain) for group in groups if not group.is_dense]
    front = [points[index] for index in pareto_front(points)]
    axis.step(*zip(*front, strict=True), where="post", color=INK, alpha=0.35, linewidth=1.2, linestyle=(0, (1, 1.5)))
    for (flavour, _), line in _lines(groups, lambda group: (group.flavour, group.level)).items():
        if flavour not in flavours:
            continue
        line = sorted(line, key=lambda group: group.alpha or 0.0)
        look = flavours.index(flavour)
        x, y = zip(*(_point(group, domain) for group in line), strict=True)
        x_sd, y_sd = ([_sd(group, corpus) for group in line] for corpus in (GENERAL, domain))
        axis.errorbar(x, y, y_sd, x_sd, marker=MARKERS[look], color=COLOURS[look], elinewidth=0.8)
        for group, point in zip(line, zip(x, y, strict=True), strict=True):
            if annotate and group.alpha is not None:
                axis.annotate(f"{group.alpha:g}", point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    for group in groups:
        if group.is_dense:
            axis.plot(*_point(group, domain), marker="*", markersize=13, color=INK, linestyle="none")
    axis.set(xlabel=f"{GENERAL} perplexity", ylabel=f"{domain} perplexity")
    axis.margins(0.12)


def curves(groups: Sequence[Group], domain: str | None, corpora: Sequence[str], axis_name: str) -> str | None:
    """Perplexity of each corpus over `axis_name` ("sparsity" or "bits"), a line for each method and alpha."""
    found = [group for group in mixed_with(groups, domain) if _amount(group, axis_name) is not None]
    amounts = sorted({amount for group in found if (amount := _amount(group, axis_name)) is not None})
    if len(amounts) < 2:
        return None
    flavours, alphas = _first_flavours(found), _spread_alphas(found)
    dense = next((group for group in groups if group.is_dense), None)
    with drawing(f"{axis_name} {domain}"):
        figure, axes = panels(len(corpora), columns=min(3, len(corpora)))
        for axis, corpus in zip(axes, corpora, strict=True):
            for (flavour, alpha), line in _lines(found, lambda group: (group.flavour, group.alpha)).items():
                if flavour in flavours and alpha in alphas:
                    _curve(axis, line, corpus, axis_name, MARKERS[flavours.index(flavour)], _alpha_colour(alpha))
            if dense and (number := dense.perplexity(corpus)):
                axis.axhline(number.value, color=INK, alpha=0.5, linestyle="--", linewidth=1)
            axis.set(title=corpus, xlabel=axis_name, ylabel="perplexity")
            plain_log_scale(axis.yaxis)
            axis.set_xticks(amounts)
        legend_below(figure, _curve_handles(flavours, alphas, dense is not None), columns=9)
        return svg_of(figure)


def _curve(axis: Any, line: Sequence[Group], corpus: str, axis_name: str, marker: str, colour: str) -> None:
    """Fractions joined by a line; n:m patterns stand alone and hollow, for they constrain more than a fraction does."""
    for patterned in (False, True):
        measured = [
            (_amount(group, axis_name), number.value, number.error or 0.0)
            for group in line
            if isinstance(group.setting.get("sparsity"), str) == patterned and (number := group.perplexity(corpus))
        ]
        if measured:
            x, y, error = zip(*sorted(measured), strict=True)
            style = {"linestyle": "none", "markerfacecolor": "none"} if patterned else {}
            axis.errorbar(x, y, yerr=error, marker=marker, color=colour, elinewidth=0.8, **style)


def accuracies(groups: Sequence[Group], columns: Sequence[Column]) -> str | None:
    """Accuracy of the first MOST_ROWS groups on each task, one panel a task."""
    columns = [column for column in columns if column[2] == "acc"]
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
            labels = [group.name for group in shown] if position % min(3, len(columns)) == 0 else []
            axis.set(title=column[0], xlabel="accuracy, %", yticks=range(len(shown)), ylim=(len(shown) - 0.5, -0.5))
            axis.set_yticklabels(labels or [""] * len(shown))
        return svg_of(figure)


def left_out(groups: Sequence[Group], domain: str) -> str:
    """What the charts of one domain do not show, as a sentence; empty where they show everything."""
    mixed = mixed_with(groups, domain)
    counts = (
        ("levels by themselves", MOST_LEVELS, len(_by_level(mixed))),
        ("methods", MOST_FLAVOURS, len({group.flavour for group in mixed})),
        ("values of α in the curves", MOST_ALPHAS, len({group.alpha for group in mixed} - {None})),
    )
    parts = [f"{most} of {count} {what}" for what, most, count in counts if count > most]
    if any(domain in group.domains and len(group.domains) > 1 for group in groups):
        parts.append(f"mixtures of {domain} with general text alone")
    return f"Drawn are only {', '.join(parts)}; the table has all." if parts else ""


def mixed_with(groups: Sequence[Group], domain: str | None) -> list[Group]:
    """The compressed groups whose data were the general corpus, `domain`, or both."""
    return [group for group in groups if not group.is_dense and group.domains <= ({domain} if domain else set())]


def _by_level(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups of each level that leaves a choice."""
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        found[group.level].append(group)
    return {level: members for level, members in found.items() if len(members) > 1}


def _has_both(group: Group, domain: str) -> bool:
    return group.perplexity(GENERAL) is not None and group.perplexity(domain) is not None


def _point(group: Group, domain: str) -> tuple[float, float]:
    general, special = group.perplexity(GENERAL), group.perplexity(domain)
    assert general, "groups without a general perplexity are left out before"
    assert special, "groups without a domain perplexity are left out before"
    return general.value, special.value


def _sd(group: Group, corpus: str) -> float:
    """Standard deviation over seeds. One seed has none to show: variants share their windows, so the standard error
    over windows says little about their differences."""
    number = group.perplexity(corpus)
    return number.error or 0.0 if number and number.seeds > 1 else 0.0


def _amount(group: Group, axis_name: str) -> float | None:
    return group.sparsity if axis_name == "sparsity" else group.setting.get("bits")


def _lines(groups: Sequence[Group], key: Callable[[Group], tuple[str, Any]]) -> dict[tuple[str, Any], list[Group]]:
    lines: dict[tuple[str, Any], list[Group]] = defaultdict(list)
    for group in groups:
        if not group.is_dense:
            lines[key(group)].append(group)
    return lines


def _first_flavours(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(group.flavour for group in groups))[:MOST_FLAVOURS]


def _spread_alphas(groups: Sequence[Group]) -> list[float | None]:
    """None where some group used no data, then at most MOST_ALPHAS alphas, the smallest and the largest among them."""
    alphas = sorted({group.alpha for group in groups if group.alpha is not None})
    if len(alphas) > MOST_ALPHAS:
        alphas = [alphas[round(i * (len(alphas) - 1) / (MOST_ALPHAS - 1))] for i in range(MOST_ALPHAS)]
    return [None] * any(group.alpha is None for group in groups) + alphas


def _alpha_colour(alpha: float | None) -> str:
    """Blue for general-only, through green to orange for domain-only; grey where no data was used."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    if alpha is None:
        return COLOURS[-1]
    return to_hex(LinearSegmentedColormap.from_list("alpha", [COLOURS[0], COLOURS[2], COLOURS[1]])(alpha))


def _flavour_handles(flavours: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], marker=MARKERS[i], color=COLOURS[i], label=flavour) for i, flavour in enumerate(flavours)]


def _front_handles(dense: Sequence[Group]) -> list[Any]:
    from matplotlib.lines import Line2D

    front = Line2D([], [], color=INK, alpha=0.35, linewidth=1.2, linestyle=(0, (1, 1.5)), label="Pareto front")
    star = Line2D([], [], color=INK, marker="*", markersize=11, linestyle="none", label="dense")
    return [front, star] if dense else [front]


def _curve_handles(flavours: Sequence[str], alphas: Sequence[float | None], dense: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker=m, color=INK, ls="none", label=f) for f, m in zip(flavours, MARKERS, strict=False)]
    names = ["no data" if alpha is None else f"α = {alpha:g}" for alpha in alphas]
    handles += [Line2D([], [], color=_alpha_colour(a), label=name) for a, name in zip(alphas, names, strict=True)]
    if dense:
        handles.append(Line2D([], [], color=INK, alpha=0.5, linestyle="--", linewidth=1, label="dense"))
    return handles
