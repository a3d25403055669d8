"""Conclusions of a study: every variant over its draws, and its differences from its baselines.

Comparisons are on test text. Validation text decides only which mixture of a recipe counts as chosen.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from crosscal.evaluation import PERPLEXITY, VALIDATION
from crosscal.evaluation.inference import MeanEstimate, holm, over_both
from crosscal.report.counterparts import Measured, by_itself, counterpart, difference
from crosscal.report.groups import GENERAL, Column, SeedGroup, columns_of
from crosscal.report.rows import StudyRow
from crosscal.report.run_files import RunFiles
from crosscal.report.table import LOWER_IS_BETTER

BETTER, WORSE, ALIKE = "better", "worse", "not distinguishable"
LEVEL = 0.05
STANDARD_ERRORS = 2.0
"""Standard errors over windows that a difference must exceed as well."""
RULE = (
    "A difference counts if its p-value, by Student's t over draws and adjusted by Holm for all comparisons with the "
    "same baseline on the same text (variants with the same mixture in every draw count as one), is below "
    f"{LEVEL:g}, and if it exceeds {STANDARD_ERRORS:g} standard errors over the test windows (or questions); "
    f"otherwise it is {ALIKE}. With one draw the p-value is over windows alone, and says nothing about other draws."
)
CHOICE = (
    "Chosen of each recipe, level and domain: the mixture of general text and that domain of the smallest geometric "
    "mean of both perplexities on validation text, the mean of all draws. What is shown of it is measured on test text."
)


def study_rows(files: RunFiles, baselines: Sequence[str]) -> list[StudyRow]:
    """Return every variant's own values, also on the validation text that chose; then every comparison on test text."""
    groups, measured = files.groups, Measured.of(files)
    tested = [column for column in columns_of(files.results) if column[1] != VALIDATION]
    chose = [(corpus, VALIDATION, metric) for corpus, _, metric in tested if metric == PERPLEXITY]
    chosen = chosen_mixtures(groups)
    rows = list(_by_themselves(groups, [*tested, *chose], measured, chosen))
    models = _models(files, groups)
    for rule in baselines:
        for column in tested:
            rows += _adjusted(list(_compared(groups, rule, column, measured, chosen)), models)
    return rows


def chosen_mixtures(groups: Sequence[SeedGroup]) -> set[str]:
    """Return the groups that validation text chooses, by name; none without it, because test text chooses nothing."""
    found: dict[tuple[Any, ...], list[tuple[float, str]]] = defaultdict(list)
    for group in groups:
        scores = {domain: _score(group, domain) for domain in _domains_weighed(group, groups)}
        for domain, score in scores.items():
            if score is not None:
                recipe = (group.method, str(group.setting), group.upstream, domain)
                found[recipe].append((score, group.name))
    return {min(scored)[1] for scored in found.values() if len(scored) > 1}


def _domains_weighed(group: SeedGroup, groups: Sequence[SeedGroup]) -> Collection[str]:
    """The domains that a group is a candidate for: its own, or every domain for general text alone; none for a searched
    mixture, which was chosen before."""
    if group.found_by is not None:
        return ()
    if group.mixture == {GENERAL: 1.0}:
        return {domain for other in groups for domain in other.domains if other.perplexity(domain, VALIDATION)}
    return group.domains if len(group.domains) == 1 else ()


def _score(group: SeedGroup, domain: str) -> float | None:
    """Logarithm of the product of general and domain perplexity on validation text."""
    general, special = group.perplexity(GENERAL, VALIDATION), group.perplexity(domain, VALIDATION)
    return math.log(general.value) + math.log(special.value) if general and special else None


def _by_themselves(
    groups: Sequence[SeedGroup], columns: Sequence[Column], measured: Measured, chosen: Collection[str]
) -> Iterator[StudyRow]:
    for group in groups:
        for column in columns:
            found = by_itself(group, column, measured)
            if found is not None:
                row = _row(group, column, found, chosen)
                interval = over_both(found)
                if column[2] == PERPLEXITY:
                    number = group.numbers[column]
                    stderr = None if found.stderr is None else number.value * found.stderr
                    interval = interval and (math.exp(interval[0]), math.exp(interval[1]))
                    sd = number.error if found.draws > 1 else None
                    row = dataclasses.replace(row, value=number.value, sd=sd, stderr=stderr)
                yield dataclasses.replace(row, interval=interval and list(interval), over="both")


def _compared(
    groups: Sequence[SeedGroup], rule: str, column: Column, measured: Measured, chosen: Collection[str]
) -> Iterator[StudyRow]:
    for group in groups:
        baseline = counterpart(group, rule, groups)
        found = difference(group, baseline, column, measured) if baseline else None
        if baseline and found:
            row = _row(group, column, found, chosen)
            interval = found.interval and list(found.interval)
            yield dataclasses.replace(row, rule=rule, baseline=baseline.name, interval=interval, p=found.p)


def _row(group: SeedGroup, column: Column, found: MeanEstimate, chosen: Collection[str]) -> StudyRow:
    return StudyRow(
        group.name,
        *column,
        rule=None,
        baseline=None,
        value=found.mean,
        sd=found.sd,
        stderr=found.stderr,
        interval=None,
        over=found.over,
        draws=found.draws,
        items=found.items,
        chosen=group.name in chosen,
    )


def _models(files: RunFiles, groups: Sequence[SeedGroup]) -> dict[str, str]:
    """Return for each group the first one of the same models: a search may find in every draw what the plan lists."""
    models = {
        row.variant: json.dumps(
            [row.model, row.method, row.setting, row.upstream, row.mixture, row.trace_normalised, row.seed],
            sort_keys=True,
        )
        for row in files.results
    }
    first: dict[frozenset[str], str] = {}
    return {
        group.name: first.setdefault(frozenset(models[one] for one in group.variants), group.name) for group in groups
    }


def _adjusted(rows: Sequence[StudyRow], models: Mapping[str, str]) -> list[StudyRow]:
    """Adjust the p-values of the comparisons of one rule in one column together, those of the same models as one."""
    tested = {(models[row.variant], row.baseline): row.p for row in rows if row.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    found = [adjusted.get((models[row.variant], row.baseline)) for row in rows]
    return [
        dataclasses.replace(row, p_holm=p_holm, comparisons=len(tested), verdict=_verdict(row, p_holm))
        for row, p_holm in zip(rows, found, strict=True)
    ]


def _verdict(row: StudyRow, p_holm: float | None) -> str:
    exceeds = abs(row.value) > STANDARD_ERRORS * (row.stderr or 0.0)
    if p_holm is None or p_holm >= LEVEL or not exceeds:
        return ALIKE
    return BETTER if (row.value < 0) == (row.metric in LOWER_IS_BETTER) else WORSE
