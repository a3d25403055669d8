"""Comparisons of a study: the baseline of each variant, and the measurements of both, draw by draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crosscal.evaluation import PERPLEXITY
from crosscal.evaluation.inference import (
    DOCUMENTS,
    QUESTIONS,
    WINDOWS,
    MeanEstimate,
    over_draws,
    over_draws_and_items,
)
from crosscal.evaluation.summaries import same_draws
from crosscal.report.groups import DENSE, Column, SeedGroup
from crosscal.report.left_dense import SLACK
from crosscal.report.rows import ResultRow
from crosscal.report.run_files import RunFiles

DOMAIN = "domain"
"""Baseline rule: a variant's own domain alone."""


def counterpart(group: SeedGroup, rule: str, groups: Sequence[SeedGroup]) -> SeedGroup | None:
    """Return the baseline of a variant by a rule of the plan's `study.baseline`; None if it has none, or is it itself.

    `dense` or a variant's name: that variant. A corpus, or `domain`: the same recipe, level and upstream on that corpus
    alone. A method: the same level, mixture and upstream. A compressed baseline is rejected if its share of parameters
    left dense differs by more than 1 %.
    """
    found = next((other for other in groups if _is_counterpart(group, rule, other)), None)
    if found is None or found is group or group.is_dense:
        return None
    is_fair = found.is_dense or abs(found.left_dense.share - group.left_dense.share) <= SLACK
    return found if is_fair else None


def _is_counterpart(group: SeedGroup, rule: str, other: SeedGroup) -> bool:
    if rule in (DENSE, other.name):
        return other.name == rule or (rule == DENSE and other.is_dense)
    if other.upstream != group.upstream:
        return False
    if other.method == rule:
        same_text = (other.mixture, other.trace_normalised) == (group.mixture, group.trace_normalised)
        return other.level == group.level and (not other.mixture or same_text)
    domains = list(group.domains) if rule == DOMAIN else [rule]
    same_recipe = (other.method, other.setting) == (group.method, group.setting) and other.found_by is None
    return same_recipe and len(domains) == 1 and other.mixture == {domains[0]: 1.0}


@dataclass(frozen=True)
class Measured:
    """The rows of a run, by variant and column."""

    rows: Mapping[tuple[str, Column], ResultRow]
    items: Mapping[tuple[str, Column], tuple[str, Sequence[float]]]
    """What the items are, and the value of each: a window's log perplexity; 1 for a correct answer; a document's score.
    """

    @classmethod
    def of(cls, files: RunFiles) -> Measured:
        rows = {(row.variant, (row.corpus_or_task, row.split, row.metric)): row for row in files.results}
        windows = {(row.variant, (row.corpus, row.split, PERPLEXITY)): (WINDOWS, row.nll) for row in files.windows}
        asked = [(QUESTIONS, row, row.correct) for row in files.questions]
        asked += [(DOCUMENTS, row, row.score) for row in files.summaries]
        tasks = {(row.variant, (row.task, row.split, row.metric)): (of, values) for of, row, values in asked}
        return cls(rows, {**windows, **tasks})

    def draws(self, group: SeedGroup, column: Column) -> dict[int | None, ModelMeasurement]:
        """Return draw → measurement; the key is None for a model that needs no calibration text."""
        found = [self.rows.get((variant, column)) for variant in group.variants]
        return {
            row.seed if group.mixture else None: self._measurement(row)
            for row in found
            if row is not None and row.value is not None
        }

    def _measurement(self, row: ResultRow) -> ModelMeasurement:
        assert row.value is not None, "rows without a number are left out before"
        unknown = (WINDOWS if row.metric == PERPLEXITY else QUESTIONS, ())
        of = self.items.get((row.variant, (row.corpus_or_task, row.split, row.metric)), unknown)
        if row.metric != PERPLEXITY:
            return ModelMeasurement(row.value, row.stderr, *of)
        return ModelMeasurement(math.log(row.value), row.stderr and row.stderr / row.value, *of)


@dataclass(frozen=True)
class ModelMeasurement:
    """A model's log perplexity, accuracy, or other number as it is."""

    value: float
    stderr: float | None
    over: str
    """What the error is over: windows, questions or documents."""
    items: Sequence[float]
    """The value of each of these; empty if they were not kept."""


def by_itself(group: SeedGroup, column: Column, measured: Measured) -> MeanEstimate | None:
    """Return a variant's own value over its draws; for perplexities the logarithm."""
    return _sure([(one,) for one in measured.draws(group, column).values()])


def difference(first: SeedGroup, second: SeedGroup, column: Column, measured: Measured) -> MeanEstimate | None:
    """Return first − second, draw by draw and window by window; None if no draw has both."""
    return _sure(list(same_draws(measured.draws(first, column), measured.draws(second, column))))


def _sure(found: Sequence[tuple[ModelMeasurement, ...]]) -> MeanEstimate | None:
    """The result for one measurement per draw, or for the first minus the second."""
    if not found:
        return None
    lengths = {len(one.items) for both in found for one in both}
    if len(lengths) == 1 and min(lengths) > 1:
        items = [zip(*(one.items for one in both), strict=True) for both in found]
        return over_draws_and_items([[_less(at) for at in each] for each in items], found[0][0].over)
    return over_draws([_less([one.value for one in both]) for both in found], _unpaired_stderr(found), found[0][0].over)


def _unpaired_stderr(found: Sequence[tuple[ModelMeasurement, ...]]) -> float | None:
    """Mean over draws of the errors over windows or questions, combined as if the variants' items were independent: an
    upper bound, used if per-item values are not known."""
    errors = [[one.stderr for one in both] for both in found]
    if any(error is None for both in errors for error in both):
        return None
    return math.fsum(math.hypot(*(error or 0.0 for error in both)) for both in errors) / len(errors)


def _less(values: Sequence[float]) -> float:
    return values[0] - math.fsum(values[1:])
