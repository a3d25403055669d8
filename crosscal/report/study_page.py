"""The section of the report on the uncertainty of a study's differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosscal.report.groups import SeedGroup
from crosscal.report.headline import domains_of
from crosscal.report.rows import StudyRow
from crosscal.report.study import CHOICE, RULE
from crosscal.report.study_plots import changes_by_alpha
from crosscal.report.study_table import change, change_text, interval_text, p_text, rule_text, rules_of, sentences

HEADERS = (
    *("variant", "baseline", "text", "change", "95 % interval", "sd over draws", "draws"),
    *("error over windows", "p", "p, Holm", "verdict"),
)


@dataclass(frozen=True)
class TableRow:
    cells: tuple[str, ...]
    chosen: bool


@dataclass(frozen=True)
class RuleTable:
    title: str
    rows: list[TableRow]


@dataclass(frozen=True)
class StudySection:
    sentences: list[str]
    tables: list[RuleTable]
    charts: list[str]
    """SVG text."""
    headers: tuple[str, ...] = HEADERS
    rule: str = RULE
    choice: str = CHOICE


def study_section(rows: Sequence[StudyRow], groups: Sequence[SeedGroup]) -> StudySection | None:
    """Return the section; None for a run that is not a study."""
    if not rows:
        return None
    tables = [
        RuleTable(rule_text(rule), [TableRow(_cells(row), row.chosen) for row in rows if row.rule == rule])
        for rule in rules_of(rows)
    ]
    charts = [changes_by_alpha(groups, rows, domain) for domain in domains_of(groups)]
    return StudySection(sentences(rows), tables, [chart for chart in charts if chart])


def _cells(row: StudyRow) -> tuple[str, ...]:
    return (
        row.variant,
        row.baseline or "–",
        f"{row.corpus_or_task} {row.metric.replace('_', ' ')}",
        change_text(row),
        interval_text(row),
        _spread(row, row.sd),
        str(row.draws),
        _spread(row, row.stderr),
        p_text(row.p),
        f"{p_text(row.p_holm)} of {row.comparisons}",
        row.verdict or "–",
    )


def _spread(row: StudyRow, spread: float | None) -> str:
    return "–" if spread is None else f"{change(row, spread):.2f}"
