"""A study's differences as text: tables in the terminal, sentences on the chosen mixtures, the page's cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosscal.evaluation import PERPLEXITY
from crosscal.evaluation.inference import DRAWS
from crosscal.report.counterparts import DOMAIN
from crosscal.report.groups import DENSE
from crosscal.report.numbers import is_fraction
from crosscal.report.rows import StudyRow
from crosscal.report.study import ALIKE

if TYPE_CHECKING:
    import rich.console
    import rich.table

TOLD = "*"


@dataclass(frozen=True)
class DifferenceTable:
    """A table per baseline: changes in percent (accuracies in points), ± half the 95 % interval."""

    rows: Sequence[StudyRow]

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterator[rich.table.Table | str]:
        for rule in rules_of(self.rows):
            found = [row for row in self.rows if row.rule == rule]
            yield f"against {rule_text(rule)}"
            yield self._table(found)
        if any(row.rule for row in self.rows):
            over = " and ".join(dict.fromkeys(row.over for row in self.rows if row.rule))
            half = f"± half the 95 % interval over {over}"
            yield f"perplexities in %, accuracies in points; {half}; {TOLD} distinguishable\n"

    def _table(self, found: Sequence[StudyRow]) -> rich.table.Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        columns = list(dict.fromkeys((row.corpus_or_task, row.metric) for row in found))
        cells = {(row.variant, (row.corpus_or_task, row.metric)): row for row in found}
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="")
        table.add_column("variant", overflow="fold")
        for name, metric in columns:
            header = f"{name}\n{'ppl' if metric == PERPLEXITY else metric}"
            table.add_column(Text(header), justify="right", no_wrap=metric == PERPLEXITY)
        for variant in dict.fromkeys(row.variant for row in found):
            texts = [(row and short_change(row)) or "–" for row in (cells.get((variant, each)) for each in columns)]
            table.add_row(Text(variant), *map(Text, texts))
        return table


def rules_of(rows: Sequence[StudyRow]) -> list[str]:
    return list(dict.fromkeys(row.rule for row in rows if row.rule))


def rule_text(rule: str) -> str:
    """Describe a baseline rule of the plan."""
    if rule == DENSE:
        return "the dense model"
    return "the same on its own domain alone" if rule == DOMAIN else f"the same with {rule} alone"


def short_change(row: StudyRow) -> str:
    """Format as "-17.7 ±2.4*"."""
    half = "" if row.interval is None else f" ±{(change(row, row.interval[1]) - change(row, row.interval[0])) / 2:.1f}"
    return f"{change(row, row.value):+.1f}{half}" + (TOLD if row.verdict not in (None, ALIKE) else " ")


def change(row: StudyRow, difference: float) -> float:
    """Return percent of the baseline's perplexity; points for accuracies; the plain difference for other metrics."""
    if row.metric == PERPLEXITY:
        return 100 * math.expm1(difference)
    return 100 * difference if is_fraction(row.metric) else difference


def change_text(row: StudyRow) -> str:
    """Format as "-17.7 %" or "+2.1 points"."""
    return f"{change(row, row.value):+.1f} {_unit(row)}".rstrip()


def interval_text(row: StudyRow) -> str:
    if row.interval is None:
        return "–"
    return " to ".join(f"{change(row, end):+.1f}" for end in row.interval)


def p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def sentences(rows: Sequence[StudyRow]) -> list[str]:
    """Return, for every mixture that validation text chose, its differences from its baselines on test text."""
    chosen = [row for row in rows if row.chosen and row.rule]
    pairs = dict.fromkeys((row.variant, row.rule, row.baseline) for row in chosen)
    return [
        f"{variant}, chosen on validation text, against {baseline}: "
        + "; ".join(_said(row) for row in chosen if (row.variant, row.rule, row.baseline) == (variant, rule, baseline))
        + "."
        for variant, rule, baseline in pairs
    ]


def _said(row: StudyRow) -> str:
    what = f"{row.corpus_or_task} {row.metric.replace('_', ' ')} {change_text(row)}"
    draws = f"{row.draws} draws" if row.over == DRAWS else f"one draw, over {row.over}"
    return f"{what} ({interval_text(row)}, {draws}; {row.verdict})"


def _unit(row: StudyRow) -> str:
    return "%" if row.metric == PERPLEXITY else "points" if is_fraction(row.metric) else ""
