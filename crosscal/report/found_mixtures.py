"""Mixture searches in the report: every candidate with its losses, the chosen one and why, and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.report.found_plots import found_chart, is_taken
from crosscal.report.groups import SeedGroup
from crosscal.report.numbers import plain_text
from crosscal.report.table import mixture_text

MOST_CHARTS = 6
MARK = "★"


@dataclass(frozen=True)
class FoundMixture:
    """One mixture search as the page shows it."""

    sentence: str
    headers: list[str]
    """The first ones are weights, one per corpus."""
    rows: list[list[str]]
    chart: str | None


def found_mixtures(run: Mapping[str, Any], groups: Sequence[SeedGroup]) -> list[FoundMixture]:
    """Return every search in the run's record; those of the first MOST_CHARTS between two corpora have a chart."""
    found = []
    for number, choice in enumerate(run.get("choices") or []):
        chart = found_chart(choice, groups) if number < MOST_CHARTS and len(choice["exponents"]) == 2 else None
        headers, rows = _table(choice)
        found.append(FoundMixture(sentence_of(choice), headers, rows, chart))
    return found


def sentence_of(choice: Mapping[str, Any]) -> str:
    """State the chosen mixture and the reason."""
    return f"{choice['variant']} is {mixture_text(choice['weights'])}: {choice['reason']}."


def _table(choice: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    corpora = list(choice["exponents"])
    measured = [corpus for corpus in corpora if any(corpus in one["perplexity"] for one in choice["tried"])]
    headers = [*corpora, *(f"loss, {corpus}" for corpus in corpora), "geometric mean"]
    headers += [f"perplexity, {corpus} (validation)" for corpus in measured]
    rows = []
    for one in choice["tried"]:
        weights = [f"{one['weights'][corpus]:.3g}" for corpus in corpora]
        losses = [plain_text(one["losses"][corpus]) for corpus in corpora]
        values = [plain_text(one["perplexity"][c]) if c in one["perplexity"] else "–" for c in measured]
        weights[0] += f" {MARK}" * is_taken(one, choice)
        rows.append([*weights, *losses, plain_text(one["objective"]), *values])
    return headers, rows
