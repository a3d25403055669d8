"""The summary in a terminal: names and numbers only; errors, settings and layer losses are on the page.

Numbers are never truncated: if the columns do not fit side by side, names are wrapped, and then the table is split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosscal.report.groups import TEST, Column, SeedGroup, main_columns
from crosscal.report.numbers import short_text
from crosscal.report.table import best_cells

if TYPE_CHECKING:
    import rich.console
    import rich.table

_SHORT = {"perplexity": "ppl", "acc": "acc %"}
WORD = 7
"""Maximum letters of a word in a header: a name, three perplexities and three accuracies fit in 80 columns."""
READABLE_NAME, LEAST_NAME = 24, 10
"""Minimum letters of a name: below the first, the table is split instead; the second holds in any case."""
GAP = 2
"""Width between columns: the cell's padding and the box's divider."""


@dataclass(frozen=True)
class TerminalTable:
    """A row for each variant, a column for each perplexity and accuracy (in percent); the best of a level in bold.

    If matrices stay dense, a column after the name gives their number and their share of the parameters.
    """

    groups: Sequence[SeedGroup]
    columns: Sequence[Column]

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterator[rich.table.Table]:
        shown, best = main_columns(self.columns), best_cells(self.groups, self.columns)
        measures = [
            _Measured(header, tuple(short_text(group.numbers.get(column), column[2]) for group in self.groups), column)
            for column, header in zip(shown, _headers(shown), strict=True)
        ]
        dense = _Measured(("left", "dense"), tuple(group.left_dense.short for group in self.groups), None)
        fixed = [dense] if any(dense.cells) else []
        name_width, parts = self._parts(fixed, measures, options.max_width)
        for part in parts:
            yield self._table(name_width, [*fixed, *part], best)

    def _parts(
        self, fixed: Sequence[_Measured], measures: Sequence[_Measured], room: int
    ) -> tuple[int, list[list[_Measured]]]:
        """Width of the names and the measures of each table: one table if that leaves the names readable."""
        name = max([len("variant"), *(_width(group.name) for group in self.groups)])
        left = room - sum(GAP + each.width for each in fixed)
        beside = [GAP + each.width for each in measures]
        for wanted in (sum(beside), max(beside, default=0)):
            width = min(name, left - wanted)
            if width >= min(name, READABLE_NAME):
                break
        width = max(width, LEAST_NAME)
        parts: list[list[_Measured]] = [[]]
        for each in measures:
            if parts[-1] and width + sum(GAP + one.width for one in (*parts[-1], each)) > left:
                parts.append([])
            parts[-1].append(each)
        return width, parts

    def _table(self, name_width: int, shown: Sequence[_Measured], best: set[tuple[str, Column]]) -> rich.table.Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="")
        table.add_column("variant", width=name_width, overflow="fold")
        for each in shown:
            table.add_column(Text("\n".join(each.header)), justify="right", no_wrap=True, min_width=each.width)
        for number, group in enumerate(self.groups):
            cells = [Text(group.name)]  # as Text: Rich would take square brackets in a name for markup
            for each in shown:
                is_best = each.column is not None and (group.name, each.column) in best
                cells.append(Text(each.cells[number], style="bold" if is_best else ""))
            table.add_row(*cells)
        return table


@dataclass(frozen=True)
class _Measured:
    header: tuple[str, ...]
    cells: tuple[str, ...]
    column: Column | None

    @property
    def width(self) -> int:
        return max(map(_width, (*self.header, *self.cells)))


def _headers(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """The words of a name below each other, long ones truncated where the columns remain distinct."""
    cut = [_header(column, cut=True) for column in columns]
    return [
        header if cut.count(header) == 1 else _header(column, cut=False)
        for column, header in zip(columns, cut, strict=True)
    ]


def _header(column: Column, *, cut: bool) -> tuple[str, ...]:
    name, split, metric = column
    words = [part for word in name.split("_") for part in ([_shortened(word)] if cut else _pieces(word))]
    return (*words, *[f"({split})"] * (split != TEST), _SHORT.get(metric, metric))


def _shortened(word: str) -> str:
    return word if len(word) <= WORD else f"{word[: WORD - 1]}…"


def _pieces(word: str) -> list[str]:
    return [word[start : start + WORD] for start in range(0, len(word), WORD)]


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
