"""The summary table: one row per variant, its seeds together; plain text cells, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosscal.report.groups import GENERAL, Column, Loss, SeedGroup
from crosscal.report.left_dense import compared
from crosscal.report.numbers import number_text

LOWER_IS_BETTER = (
    *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"),  # lm-eval's
    "risk_ratio",
)
TEXT_COLUMNS = 4
LEFT_DENSE = "left dense (of parameters)"


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False
    """Whether it is the best of its column among the variants of the same level."""


@dataclass(frozen=True)
class SummaryTable:
    headers: tuple[str, ...]
    """The first TEXT_COLUMNS are text, the others numbers."""
    rows: tuple[tuple[Cell, ...], ...]
    errors: str
    """What the ± means."""


def summary_table(groups: Sequence[SeedGroup], columns: Sequence[Column]) -> SummaryTable:
    """Return variant, method, level, mixture, a column for each measured number, and the mean relative loss of
    matrices.

    If any matrix stays dense, one column gives their number and share.
    """
    dense = any(group.left_dense.matrices for group in groups)
    losses = any(group.relative_loss is not None for group in groups)
    heldout = any(group.heldout_relative_loss is not None for group in groups)
    headers = ["variant", "method", "level", "mixture", *[LEFT_DENSE] * dense, *map(_column_header, columns)]
    headers += ["relative loss"] * losses + ["held-out loss"] * heldout
    best = best_cells(groups, columns)
    rows = []
    for group in groups:
        words = (group.name, group.flavour, group.level or "–", mixture_text(group.mixture))
        cells = [*map(Cell, words), *[Cell(group.left_dense.cell or "–")] * dense]
        for column in columns:
            cells.append(Cell(number_text(group.numbers.get(column), column[2]), (group.name, column) in best))
        cells += [Cell(_loss_text(group.relative_loss))] * losses
        cells += [Cell(_loss_text(group.heldout_relative_loss))] * heldout
        rows.append(tuple(cells))
    seeds = max((number.seeds for group in groups for number in group.numbers.values()), default=1)
    errors = "± standard error" + (", or standard deviation over n seeds where n is given" if seeds > 1 else "")
    return SummaryTable(tuple(headers), tuple(rows), errors)


def mixture_text(mixture: dict[str, float]) -> str:
    """Format as "0.5 general + 0.5 biomedical"; a single corpus is its name alone."""
    weighed = {corpus: weight for corpus, weight in mixture.items() if weight > 0}
    if len(weighed) == 1:
        return next(iter(weighed))
    in_order = sorted(weighed.items(), key=lambda item: item[0] != GENERAL)
    return " + ".join(f"{weight:g} {corpus}" for corpus, weight in in_order) or "–"


def _column_header(column: Column) -> str:
    name, split, metric = column
    where = "" if split == "test" else f" ({split})"
    return f"{name}{where} {metric.replace('_', ' ')}"


def best_cells(groups: Sequence[SeedGroup], columns: Sequence[Column]) -> set[tuple[str, Column]]:
    """Return (name, column) of the best values of each level that has several comparable variants."""
    found: set[tuple[str, Column]] = set()
    for level in compared(groups).values():
        for column in columns:
            values = {group.name: group.numbers[column].value for group in level if column in group.numbers}
            best = (min if column[2] in LOWER_IS_BETTER else max)(values.values(), default=None)
            found |= {(name, column) for name, value in values.items() if value == best and len(values) > 1}
    return found


def _loss_text(loss: Loss | None) -> str:
    """In percent, with the number of matrices in the mean if that is not every solved one."""
    if loss is None:
        return "–"
    behind = "" if loss.matrices == loss.of_solved else f" ({loss.matrices} of {loss.of_solved})"
    return f"{100 * loss.mean:.3g} %{behind}"
