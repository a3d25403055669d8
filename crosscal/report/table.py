"""The summary table: a row for each variant, its seeds together; plain text cells, for a terminal and for the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from crosscal.report.groups import GENERAL, Column, Group, Number

LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")

TEXT_COLUMNS = 4


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False
    """Best of its column among the variants of the same level."""


@dataclass(frozen=True)
class SummaryTable:
    headers: tuple[str, ...]
    """The first TEXT_COLUMNS are words, the others numbers."""
    rows: tuple[tuple[Cell, ...], ...]
    errors: str
    """What the ± stands for."""


def summary_table(groups: Sequence[Group], columns: Sequence[Column]) -> SummaryTable:
    """Variant, method, level, mixture, a column for each measured number, and the mean relative loss of matrices."""
    losses = any(group.relative_loss is not None for group in groups)
    heldout = any(group.heldout_relative_loss is not None for group in groups)
    headers = ["variant", "method", "level", "mixture", *map(_column_header, columns)]
    headers += ["relative loss"] * losses + ["held-out loss"] * heldout
    best = best_by_level(groups, columns)
    rows = []
    for group in groups:
        words = (group.name, group.flavour, group.level or "–", mixture_text(group.mixture))
        cells = [*map(Cell, words), *(_number_cell(group, column, best) for column in columns)]
        cells += [Cell(_percent(group.relative_loss))] * losses
        cells += [Cell(_percent(group.heldout_relative_loss))] * heldout
        rows.append(tuple(cells))
    seeds = max((number.seeds for group in groups for number in group.numbers.values()), default=1)
    errors = "± standard error" + (", or standard deviation over n seeds where n is given" if seeds > 1 else "")
    return SummaryTable(tuple(headers), tuple(rows), errors)


def number_text(number: Number | None, metric: str) -> str:
    """As in "86.4 ± 2.6", in percent for accuracies, with n where several seeds stand behind it."""
    if number is None:
        return "–"
    scale, unit = (100.0, " %") if metric.startswith("acc") else (1.0, "")
    text = f"{scale * number.value:.4g}"
    if number.error is not None:
        text += f" ± {scale * number.error:.2g}"
    return text + unit + (f" (n={number.seeds})" if number.seeds > 1 else "")


def mixture_text(mixture: dict[str, float]) -> str:
    """As in "0.5 general + 0.5 biomedical"; a single corpus goes by its name alone."""
    weighed = {corpus: weight for corpus, weight in mixture.items() if weight > 0}
    if len(weighed) == 1:
        return next(iter(weighed))
    in_order = sorted(weighed.items(), key=lambda item: item[0] != GENERAL)
    return " + ".join(f"{weight:g} {corpus}" for corpus, weight in in_order) or "–"


def _column_header(column: Column) -> str:
    name, split, metric = column
    where = "" if split == "test" else f" ({split})"
    return f"{name}{where} {metric.replace('_', ' ')}"


def _number_cell(group: Group, column: Column, best: dict[tuple[str, Column], float]) -> Cell:
    number = group.numbers.get(column)
    return Cell(number_text(number, column[2]), number is not None and best.get((group.level, column)) == number.value)


def best_by_level(groups: Sequence[Group], columns: Sequence[Column]) -> dict[tuple[str, Column], float]:
    """The best value of each column at each level that has several variants."""
    values: dict[tuple[str, Column], list[float]] = defaultdict(list)
    for group in groups:
        for column in columns:
            if column in group.numbers and not group.is_dense:
                values[group.level, column].append(group.numbers[column].value)
    return {
        key: (min if key[1][2] in LOWER_IS_BETTER else max)(found) for key, found in values.items() if len(found) > 1
    }


def _percent(loss: float | None) -> str:
    return "–" if loss is None else f"{100 * loss:.3g} %"
