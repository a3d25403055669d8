"""Cells of the tables of benchmarks/README.md: rows of a result file by case, numbers, Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from records import RESULTS

CORPORA = ("general", "biomedical", "legal")
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cases(rows: Iterable[Row], cell: Callable[[Row], Any] = lambda row: row) -> dict[str, dict[str, Any]]:
    """Return case → figure → `cell` of its row, in the order of the rows."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["figure"]] = cell(row)
    return found


def markdown(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headers), *map(list, rows)]
    rule = ["---"] * len(lines[0])
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def circumstances(rows: Iterable[Row]) -> str:
    found = dict.fromkeys(f"{row['device']}, {row['date']}, commit {row['commit']}" for row in rows)
    return f"\n{'; '.join(found)}.\n"


def plain(name: str) -> str:
    """All rows of a result file."""
    rows = read(name)
    cells = ([row["case"], row["figure"], number(row["value"]), spread(row), row["unit"]] for row in rows)
    return markdown(("case", "figure", "value", "±", "unit"), cells) + circumstances(rows)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def spread(row: Row) -> str:
    return number(row.get("spread"))
