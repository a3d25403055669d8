"""Summaries of a run for places where its report cannot be opened: the table, the trade-off and the files.

All are bounded in size. Cells and pages are plain values (strings, Markdown), independent of what displays them.
"""

from __future__ import annotations

import base64
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscal.evaluation import PERPLEXITY
from crosscal.evaluation.comparison import change_text
from crosscal.evaluation.summaries import PairedDifference
from crosscal.report.groups import Column, SeedGroup, choosing_columns, columns_of, main_columns
from crosscal.report.headline import RULE, Recommendation, best_variants, domains_of, sentences_of
from crosscal.report.left_dense import common_text
from crosscal.report.numbers import number_text, plain_text
from crosscal.report.plots import trade_off
from crosscal.report.run_files import read_run

MOST_ROWS = 100
MOST_COLUMNS = 12
MOST_TABLE_BYTES = 32 * 1024
MOST_PICTURE_BYTES = 192 * 1024
"""Of one picture; those of the demo have 133 kB."""
MOST_PICTURES = 3
MOST_NOTES = 20
MOST_WORDS = 300
"""Characters of one note."""


@dataclass(frozen=True)
class Table:
    rows: list[dict[str, str]]
    about: str
    """What the numbers are, and what was omitted."""


def measured(run_dir: Path) -> tuple[list[SeedGroup], list[Column], frozenset[str]]:
    """Return the groups and columns of a run directory, and the variants whose models were kept."""
    files = read_run(run_dir)
    return files.groups, columns_of(files.results), files.models


def decided_among(run_dir: Path) -> tuple[list[SeedGroup], list[Column]]:
    """Return the groups of a run directory, and the columns by which one is chosen."""
    files = read_run(run_dir)
    return files.groups, choosing_columns(files.results)


def results_table(groups: Sequence[SeedGroup], columns: Sequence[Column]) -> Table:
    """Return a row per variant: dense, then each level by alpha, recommended ones marked; perplexities with change."""
    wanted, some_dense = main_columns(columns), any(group.left_dense.matrices for group in groups)
    shown, dense = wanted[:MOST_COLUMNS], next((group for group in groups if group.is_dense), None)
    take = _to_take(groups)
    found: dict[str, dict[str, str]] = {}
    room = MOST_TABLE_BYTES - 2
    in_order = _in_order(groups)
    for group in sorted(in_order, key=lambda group: not (group.is_dense or group.name in take))[:MOST_ROWS]:
        row = {"variant": group.name, "take": take.get(group.name, ""), "alpha": _alpha(group)}
        row |= {"left dense": group.left_dense.short or "–"} if some_dense else {}
        row |= {_header(column): _cell(group, dense, column) for column in shown}
        room -= len(json.dumps(row)) + 2
        if room < 0:
            break
        found[group.name] = row
    rows = [found[group.name] for group in in_order if group.name in found]
    about = (
        "Perplexity on test texts, which choose nothing, and its change against the dense model; accuracy of tasks. "
    )
    counts = ((len(rows), len(groups), "variants"), (len(shown), len(wanted), "measures"))
    missing = [f"{most} of {count} {what}" for most, count, what in counts if most < count]
    return Table(rows, about + (f"Shown are {' and '.join(missing)}; results.jsonl has all." if missing else ""))


def trade_off_page(
    groups: Sequence[SeedGroup], kept: Collection[str] = (), folder: str = "models", *, published: str = ""
) -> str | None:
    """Return Markdown with the chart and the recommended variants of each domain; None if there is nothing to compare.

    `kept`: the variants whose models were kept, in `folder`. `published`: the domain for which the plan publishes one.
    """
    domains = domains_of(groups)
    parts = [part for domain in domains[:MOST_PICTURES] for part in _weighed(groups, domain, kept, folder)]
    if len(domains) > MOST_PICTURES:
        parts.append(f"Shown are {MOST_PICTURES} of {len(domains)} domains; report.html has all.")
    if parts and published:
        parts.append(f"Which one is published for {published} is decided by the plan's `publish`: see the decision.")
    return "\n\n".join(parts) or None


def files_page(run_dir: Path, record: dict[str, Any]) -> str:
    """Return Markdown with the paths of report and models; not links, as browsers follow none from a page to a file."""
    places = {"report": "report.html", "models": "models/", "numbers": "results.jsonl", "plan": "plan.yaml"}
    kept = {what: run_dir / name for what, name in places.items() if (run_dir / name).exists()}
    lines = [f"- {what}: {_code(str(path))}" for what, path in kept.items()]
    read, cache = record["calibration_tokens_read"], record["cache"]
    cost = f"{read:,} calibration tokens read" if read else "no forward pass for calibration"
    cost += f"; moments: {cache['hits']} from the cache, {cache['misses']} made."
    notes = [_code(str(note)[:MOST_WORDS]) for note in record.get("notes") or []]
    more = [f"{len(notes) - MOST_NOTES} more notes stand in run.json."] if len(notes) > MOST_NOTES else []
    return "\n\n".join(["\n".join(lines), cost, *notes[:MOST_NOTES], *more])


def decision_page(
    domain: str,
    version: int,
    decided: Mapping[str, Any],
    groups: Sequence[SeedGroup] = (),
    columns: Sequence[Column] = (),
) -> str:
    """Return Markdown that explains why a landed domain's model was published, or kept and not published.

    `groups` and `columns`: as from `decided_among`.

    `decided`: outcome, reason, run_dir; variant and model (its key in the store), unless none was measured; changes,
    the basis of the decision; perplexity on test windows, of candidate and published; left_dense, if matrices of the
    variant stay dense.
    """
    numbers, changes = decided["perplexity"], decided.get("changes") or {}
    candidate, published = numbers["candidate"], numbers["published"] or {}
    headings = ("corpus", "new against dense", "against published before", "new, test", "published before, test")
    head = f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
    rows = [
        f"| {corpus} | {' | '.join(_change(changes.get(corpus, {}), other) for other in ('dense', 'published'))}"
        f" | {' | '.join(_plain_number(each.get(corpus)) for each in (candidate, published))} |"
        for corpus in list(dict.fromkeys([*changes, *candidate]))[:MOST_COLUMNS]
    ]
    known = {"variant": decided.get("variant"), "model in the store": decided.get("model")}
    known["run directory"] = decided["run_dir"]
    facts = [f"- {what}: {_code(value)}" for what, value in known.items() if value]
    facts += [f"- left dense: {decided['left_dense']}"] if decided.get("left_dense") else []
    reason = decided["reason"][: 4 * MOST_WORDS]
    about = "Decided by the changes on validation windows, ± their standard error; test perplexities only report."
    head_line, table = f"## {domain} v{version}: {decided['outcome']}", head + "\n".join(rows)
    among = _candidates(decided, groups, columns)
    return "\n\n".join([head_line, reason, table, about, *among, "\n".join(facts)])


def _candidates(decided: Mapping[str, Any], groups: Sequence[SeedGroup], columns: Sequence[Column]) -> Iterator[str]:
    """The candidates of the decision: dense, then by alpha; the one that was decided on is marked."""
    shown = columns[:MOST_COLUMNS]
    if not shown:
        return
    dense = next((group for group in groups if group.is_dense), None)
    lines = [["", "variant", "alpha", *map(_header, shown)]]
    lines.append(["---"] * len(lines[0]))
    for group in _in_order(groups)[:MOST_ROWS]:
        is_it = decided.get("variant") in (group.name, *group.variants)
        mark, name = (f"**{decided['outcome']}**", f"**{group.name}**") if is_it else ("", group.name)
        lines.append([mark, name, _alpha(group), *(_cell(group, dense, column) for column in shown)])
    yield "Among these, by perplexity on validation windows and its change against the dense model:"
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(svg: str) -> str | None:
    """Return a chart as Markdown, on white so that it is readable on dark pages too; None if it is too large."""
    start, end, rest = svg.partition(">")
    white = '<rect width="100%" height="100%" fill="white"/>'
    drawn = re.sub(r"font-family: [^;]*;", "font-family: sans-serif;", re.sub(r">\s+<", "><", rest))  # a third smaller
    data = (start + end + white + drawn).replace("currentColor", "#1a1b1c").encode()
    text = f"![general against domain perplexity](data:image/svg+xml;base64,{base64.b64encode(data).decode()})"
    return text if len(text) <= MOST_PICTURE_BYTES else None


def _weighed(groups: Sequence[SeedGroup], domain: str, kept: Collection[str], folder: str) -> Iterator[str]:
    best = best_variants(groups, domain)
    chart = trade_off(groups, domain)
    if chart is None:
        return
    yield f"## {domain}"
    yield picture(chart) or "The chart is too large for this page; report.html has it."
    if best:
        columns = f"level | take | general, test | {domain}, test | test against general-only"
        yield f"| {columns} |\n|---|---|---|---|---|\n" + "\n".join(map(_best_row, best[:MOST_ROWS]))
    yield "\n".join(f"- {_plain(said)}" for said in sentences_of(groups, domain, kept, folder)[:MOST_NOTES])
    yield f"{RULE} {common_text(groups)}".strip()


def _best_row(best: Recommendation) -> str:
    numbers = (number_text(best.general, "perplexity"), number_text(best.special, "perplexity"))
    change = "–" if best.change is None else f"{100 * best.change:+.1f} %"
    dense = best.group.left_dense.short
    take = best.group.name + (f" ({dense} left dense)" if dense else "")
    return f"| {best.level} | {take} | {numbers[0]} | {numbers[1]} | {change} |"


def _plain(text: str) -> str:
    """Bounded in length, and with HTML escaped."""
    return text[: 4 * MOST_WORDS].replace("<", "&lt;")


def _change(changes: Mapping[str, Mapping[str, Any]], other: str) -> str:
    return change_text(PairedDifference(**changes[other])) if other in changes else "–"


def _plain_number(value: float | None) -> str:
    return "–" if value is None else plain_text(value)


def _to_take(groups: Sequence[SeedGroup]) -> dict[str, str]:
    """Name of a group → the domains for which it is recommended at its level."""
    found: dict[str, list[str]] = defaultdict(list)
    for domain in domains_of(groups):
        for best in best_variants(groups, domain):
            found[best.group.name].append(domain)
    return {name: f"for {', '.join(domains)}"[:MOST_WORDS] for name, domains in found.items()}


def _in_order(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """The dense model, then each level and method in the plan's order; in each, every domain's mixtures by alpha."""
    kinds = list(dict.fromkeys((group.level, group.flavour) for group in groups))
    domains = [frozenset[str](), *dict.fromkeys(group.domains for group in groups)]
    return sorted(
        groups,
        key=lambda group: (
            not group.is_dense,
            kinds.index((group.level, group.flavour)),
            domains.index(group.domains),
            group.alpha or 0.0,
        ),
    )


def _alpha(group: SeedGroup) -> str:
    return "" if group.alpha is None else f"{group.alpha:g}"


def _header(column: Column) -> str:
    name, split, metric = column
    return f"{name[:40]}" + ("" if metric == PERPLEXITY else f" {metric[:20]}") + f", {split}"


def _cell(group: SeedGroup, dense: SeedGroup | None, column: Column) -> str:
    number = group.numbers.get(column)
    before = dense.numbers.get(column) if dense and dense is not group else None
    if number is None or before is None or column[2] != "perplexity":
        return number_text(number, column[2])
    return f"{number_text(number, column[2])} ({100 * (number.value / before.value - 1):+.1f} %)"


def _code(text: str) -> str:
    """Format as code, so that nothing in it is interpreted as markup."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"
