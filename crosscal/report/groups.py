"""Groups of variants that differ only by seed: the units of tables and plots."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.evaluation import PERPLEXITY, TEST, VALIDATION
from crosscal.evaluation.comparison import Draws
from crosscal.evaluation.summaries import spread
from crosscal.report.left_dense import DenseShare, left_dense_of
from crosscal.report.numbers import Number
from crosscal.report.rows import LayerRow, ResultRow, WindowRow

GENERAL = "general"
"""The corpus that domains are compared with."""
DENSE = "dense"
Column = tuple[str, str, str]
"""(corpus or task, split, metric)."""


@dataclass(frozen=True)
class Loss:
    """Mean of relative losses over matrices, without those left dense and those without the number."""

    mean: float
    matrices: int
    of_solved: int
    """Number of solved matrices, with or without the number."""


@dataclass(frozen=True)
class SeedGroup:
    """One method at one setting, upstream and mixture, over all its seeds."""

    name: str
    """The variant's name, without the seed if there are several."""
    variants: tuple[str, ...]
    method: str
    flavour: str
    """The method, with what else distinguishes its groups besides level and mixture: "gptq", "gptq, sequential"."""
    setting: dict[str, Any]
    amounts: list[dict[str, Any]]
    """Amounts of compression, by axis (see `ResultRow.amounts`)."""
    upstream: str
    mixture: dict[str, float]
    numbers: dict[Column, Number]
    relative_loss: Loss | None
    """Over the solved matrices of all seeds, on the calibration mixture."""
    heldout_relative_loss: Loss | None
    left_dense: DenseShare
    window_nll: Mapping[tuple[str, str], Draws]
    """(corpus, split) -> seed -> negative log-likelihood of each window; empty if none was kept."""
    found_by: str | None
    """How the mixture was searched; it may differ between draws, and `mixture` is that of the first. None if given."""
    trace_normalised: bool

    @property
    def is_dense(self) -> bool:
        return self.method == DENSE

    @property
    def level(self) -> str:
        """Amount of compression in words, or all settings if no amount is given; groups of one level are comparable."""
        return level_of([amount["text"] for amount in self.amounts], self.setting)

    def amount(self, axis: str) -> dict[str, Any] | None:
        """Return the last amount on this axis."""
        return next((amount for amount in reversed(self.amounts) if amount["axis"] == axis), None)

    @property
    def alpha(self) -> float | None:
        """Total weight of all corpora but the general one; None if no data was used."""
        return round(1.0 - self.mixture.get(GENERAL, 0.0), 9) if self.mixture else None

    @property
    def domains(self) -> frozenset[str]:
        """The corpora other than the general one that have a weight; empty for a general-only mixture."""
        return frozenset(corpus for corpus, weight in self.mixture.items() if weight > 0 and corpus != GENERAL)

    def perplexity(self, corpus: str, split: str = TEST) -> Number | None:
        return self.numbers.get((corpus, split, PERPLEXITY))


def groups_of(
    results: Sequence[ResultRow], layers: Sequence[LayerRow], windows: Iterable[WindowRow] = ()
) -> list[SeedGroup]:
    """Return one group for the rows that differ by seed alone, in the order of their first appearance."""
    by_key: dict[str, list[ResultRow]] = defaultdict(list)
    for row in results:
        mixture = row.found_by or row.mixture  # a searched mixture differs between draws
        same = [_stem(row), row.model, row.method, row.setting, row.upstream, mixture, row.trace_normalised]
        by_key[json.dumps(same, sort_keys=True)].append(row)
    layers_of: dict[str, list[LayerRow]] = defaultdict(list)
    for layer in layers:
        layers_of[layer.variant].append(layer)
    windows_of: dict[str, list[WindowRow]] = defaultdict(list)
    for window in windows:
        windows_of[window.variant].append(window)
    seeded = [sorted(rows, key=lambda row: row.seed or 0) for rows in by_key.values()]  # seeds are paired in order
    firsts = [rows[0] for rows in seeded]
    return [_group(rows, layers_of, windows_of, _flavour(rows[0], firsts)) for rows in seeded]


def columns_of(results: Sequence[ResultRow]) -> list[Column]:
    """Return every (corpus or task, split, metric) with a number, except `choosing_columns`: perplexities first, then
    tasks, in order of appearance."""
    reported = (column for column in _measured(results) if column[1:] != (VALIDATION, PERPLEXITY))
    return sorted(reported, key=lambda column: column[2] != PERPLEXITY)


def choosing_columns(results: Sequence[ResultRow]) -> list[Column]:
    """Return the perplexities on validation windows, which are used to choose and not reported."""
    return [column for column in _measured(results) if column[1:] == (VALIDATION, PERPLEXITY)]


def _measured(results: Sequence[ResultRow]) -> dict[Column, None]:
    return dict.fromkeys((row.corpus_or_task, row.split, row.metric) for row in results if row.value is not None)


def main_columns(columns: Sequence[Column]) -> list[Column]:
    """Return the test columns without the second way to score the same questions or summaries."""
    return [
        (name, split, metric)
        for name, split, metric in columns
        if split != VALIDATION
        and (metric != "acc_norm" or (name, split, "acc") not in columns)
        and not (metric.endswith(("rouge1", "rouge2")) and (name, split, "rougeL") in columns)
    ]


def _stem(row: ResultRow) -> str:
    """The variant's name without its seed."""
    return row.variant.removesuffix(f"-s{row.seed}")


def level_of(texts: Sequence[str], setting: Mapping[str, Any]) -> str:
    """ "50 % sparsity, 4 bits g128"; all settings if no step gives an amount."""
    return ", ".join(texts) or ", ".join(f"{key} {value}" for key, value in setting.items())


def axes_of(groups: Iterable[SeedGroup]) -> list[str]:
    """Return the axes that have amounts, in the order of their first appearance."""
    return list(dict.fromkeys(amount["axis"] for group in groups for amount in group.amounts))


def _group(
    rows: list[ResultRow],
    layers_of: Mapping[str, list[LayerRow]],
    windows_of: Mapping[str, list[WindowRow]],
    flavour: str,
) -> SeedGroup:
    first = rows[0]
    variants = tuple(dict.fromkeys(row.variant for row in rows))
    layers = [layer for variant in variants for layer in layers_of.get(variant, [])]
    solved = [layer for layer in layers if not layer.stays_dense]
    window_nll: dict[tuple[str, str], dict[int | None, Sequence[float]]] = defaultdict(dict)
    for variant, seed in {row.variant: row.seed if row.mixture else None for row in rows}.items():
        for window in windows_of.get(variant, []):
            window_nll[window.corpus, window.split][seed] = window.nll
    measured: dict[Column, dict[str, ResultRow]] = defaultdict(dict)
    for row in rows:  # a task that a plan also names by its tag has two equal rows
        if row.value is not None:
            measured[row.corpus_or_task, row.split, row.metric][row.variant] = row
    return SeedGroup(
        name=variants[0] if len(variants) == 1 else _stem(first),
        variants=variants,
        method=first.method,
        flavour=flavour,
        setting=first.setting,
        amounts=first.amounts,
        upstream=first.upstream,
        mixture=first.mixture,
        numbers={column: _number(list(found.values())) for column, found in measured.items()},
        relative_loss=_mean([layer.relative_loss for layer in solved]),
        heldout_relative_loss=_mean([layer.heldout_relative_loss for layer in solved]),
        left_dense=left_dense_of(layers),
        window_nll=window_nll,
        found_by=first.found_by,
        trace_normalised=first.trace_normalised,
    )


def _flavour(row: ResultRow, firsts: Sequence[ResultRow]) -> str:
    peers = [other for other in firsts if other.method == row.method]
    axes = {amount["axis"] for amount in row.amounts}
    differing = [
        key
        for key, value in row.setting.items()
        if key not in axes and any(other.setting.get(key) != value for other in peers)
    ]
    words = [row.method, *(f"{key} {row.setting[key]}" for key in differing)]
    if any(other.upstream != row.upstream for other in peers):
        words.append(row.upstream)
    if row.trace_normalised:
        words.append("trace-normalised")
    return ", ".join(words)


def _number(rows: list[ResultRow]) -> Number:
    over_seeds = spread(row.value for row in rows if row.value is not None)
    return Number(over_seeds.mean, rows[0].stderr if len(rows) == 1 else over_seeds.sd, len(rows))


def _mean(values: Sequence[float | None]) -> Loss | None:
    known = [value for value in values if value is not None]
    return Loss(math.fsum(known) / len(known), len(known), len(values)) if known else None
