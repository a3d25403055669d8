"""The summary in a terminal: names and numbers only; errors, settings and layer losses are on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crosscal.report.groups import Column, Group, Number
from crosscal.report.table import best_by_level

if TYPE_CHECKING:
    import rich.table


_SHORT = {"perplexity": "ppl", "acc": "acc %"}


def terminal_table(groups: Sequence[Group], columns: Sequence[Column]) -> rich.table.Table:
    """A row for each variant, a column for each perplexity and accuracy (in percent); the best of a level in bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = [column for column in columns if column[2] != "acc_norm"]
    best = best_by_level(groups, shown)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
    table.add_column("variant", no_wrap=True)
    for name, _, metric in shown:
        lines = [*map(_shortened, name.split("_")), _SHORT.get(metric, metric)]
        table.add_column(Text("\n".join(lines)), justify="right", no_wrap=True)
    for group in groups:
        cells = [Text(group.name)]  # as Text, because a name in square brackets would be taken for markup
        for column in shown:
            number = group.numbers.get(column)
            is_best = number is not None and best.get((group.level, column)) == number.value
            cells.append(Text(_text(number, column[2]), style="bold" if is_best else ""))
        table.add_row(*cells)
    return table


def _text(number: Number | None, metric: str) -> str:
    if number is None:
        return "–"
    return f"{100 * number.value:.1f}" if metric.startswith("acc") else f"{number.value:.4g}"


def _shortened(word: str) -> str:
    """At most seven characters, so that a name, three perplexities and three accuracies fit in 80 columns."""
    return word if len(word) <= 7 else f"{word[:6]}…"
