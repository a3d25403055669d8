"""Generate the tables of benchmarks/README.md, between their marks, from results/*.json.

    python benchmarks/table.py [--check]

A table is between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a file of `results/`, or one of the views below.
The prose around the tables is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from records import RESULTS

from crosscal.report.numbers import with_error

README = Path(__file__).parent / "README.md"
MARK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CORPORA = ("general", "biomedical", "legal")
Rows = list[dict[str, Any]]


def read(name: str) -> Rows:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headers), *map(list, rows)]
    rule = ["---"] * len(lines[0])
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def circumstances(rows: Rows) -> str:
    found = dict.fromkeys(f"{row['device']}, {row['date']}, commit {row['commit']}" for row in rows)
    return f"\n{'; '.join(found)}.\n"


def plain(name: str) -> str:
    """All rows of a result file."""
    rows = read(name)
    cells = ([row["case"], row["figure"], number(row["value"]), spread(row), row["unit"]] for row in rows)
    return markdown(("case", "figure", "value", "±", "unit"), cells) + circumstances(rows)


def grid() -> str:
    """One row per variant, one column per corpus; ± is the standard error over test windows."""
    rows = read("testbed_grid")
    by_case: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = with_error(row["value"], row["spread"])
        by_case.setdefault(row["case"].removeprefix("grid "), {})[row["figure"].removesuffix(" perplexity")] = cell
    cells = ([name, *(values.get(corpus, "–") for corpus in CORPORA)] for name, values in by_case.items())
    return markdown(("variant", *CORPORA), cells) + circumstances(rows)


def draws() -> str:
    """Mean ± standard deviation over draws, and the paired change against general-only calibration."""
    rows = read("testbed_draws")
    by_case: dict[str, dict[str, str]] = {}
    for row in rows:
        digits = "{:+.1f} ± {:.1f} %" if row["unit"] == "%" else "{:.1f} ± {:.1f}"
        cell = digits.format(row["value"], row["spread"])
        by_case.setdefault(row["case"].removeprefix("draws "), {})[row["figure"]] = cell
    headers = ["setting, mixture"]
    figures = []
    for corpus in CORPORA:
        headers += [corpus, f"{corpus}, change"]
        figures += [f"{corpus} perplexity", f"{corpus} against general"]
    cells = ([name, *(values.get(figure, "") for figure in figures)] for name, values in by_case.items())
    return markdown(headers, cells) + circumstances(rows)


def peers() -> str:
    """One row per contender: time, memory and errors; `results/vs_peers.json` has every stage."""
    rows = read("vs_peers")
    figures = {
        "all, wall time": "wall s",
        "peak memory of the process": "peak MiB",
        "calibration error": "error, calibration",
        "held-out error": "error, held-out",
        "held-out perplexity": "perplexity, held-out",
    }
    by_case: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["figure"] in figures:
            by_case.setdefault(row["case"], {})[row["figure"]] = number(row["value"])
    cells = ([case, *(values.get(figure, "") for figure in figures)] for case, values in by_case.items())
    return markdown(("case", *figures.values()), cells) + circumstances(rows)


SOLVERS = {
    "layer loss": "layer loss",
    "held-out loss": "held-out loss",
    "general damage": "general, % over dense",
    "domain damage": "domain, % over dense",
    "seconds": "seconds",
}


def solvers(name: str = "solvers", figures: Mapping[str, str] = SOLVERS) -> str:
    """One row per recipe and level: each figure, followed by its ratio to the first recipe of that level."""
    rows = read(name)
    by_case: dict[str, dict[str, str]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["figure"]] = number(row["value"])
    cells = []
    for case, values in by_case.items():
        if not figures.keys() & values.keys():
            continue  # the load of the machine
        ratios = {f: values.get(f"{f} over base") for f in figures if not f.endswith("perplexity")}
        cells.append([case, *(values.get(f, "") + (f" ({ratios[f]})" if ratios.get(f) else "") for f in figures)])
    return markdown(("recipe, level", *figures.values()), cells) + circumstances(rows)


def scales() -> str:
    return solvers("scales", {"loss behind norms": "loss, matrices behind norms", **SOLVERS})


def real_models() -> str:
    perplexities = {"general perplexity": "general perplexity", "domain perplexity": "domain perplexity"}
    return solvers("real_models", {**perplexities, **SOLVERS, "peak memory": "peak MiB"})


def allocation() -> str:
    """One row per allocator: perplexities (in brackets relative to dense), lowest and highest block sparsity."""
    rows = read("allocation")
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["figure"]] = row["value"]
    dense, cells = by_case["dense"], []
    for case, values in by_case.items():
        figures = [figure for figure in values if figure.endswith("perplexity")]
        cell = [f"{number(values[figure])} ({100 * (values[figure] / dense[figure] - 1):+.1f} %)" for figure in figures]
        blocks = [number(values.get(f"{which} sparsity of a block")) for which in ("lowest", "highest")]
        cells.append([case, *(cell if case != "dense" else [number(values[f]) for f in figures]), *blocks])
    heads = ("allocator", "general", "legal", "lowest sparsity of a block", "highest")
    return markdown(heads, cells) + circumstances(rows)


def gradients() -> str:
    """One row per method and level: perplexities of both domains' models (in brackets relative to dense)."""
    rows = read("gradients")
    by_case: dict[str, dict[str, float]] = {}
    for row in (row for row in rows if row["figure"].endswith(" perplexity")):
        by_case.setdefault(row["case"], {})[row["figure"].removesuffix(" perplexity")] = row["value"]
    dense, cells = by_case.pop("dense"), []
    for name in dict.fromkeys(case.rpartition(",")[0] for case in by_case):
        found = [(corpus, by_case[f"{name}, {domain}"]) for domain in CORPORA[1:] for corpus in ("general", domain)]
        cells.append([name, *(f"{number(v[c])} ({100 * (v[c] / dense[c] - 1):+.1f} %)" for c, v in found)])
    costs = [f"{row['case']}, {row['figure']}: {number(row['value'])} {row['unit']}".strip() for row in rows[:5]]
    heads = ("method", "half biomedical: general", "biomedical", "half legal: general", "legal")
    return markdown(heads, cells) + f"\n{'; '.join(costs)}.\n" + circumstances(rows)


def study() -> str:
    """One row per variant: perplexities over draws, and changes against general text alone and the domain alone."""
    rows = read("study")
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["figure"]] = row
    pairs = [(rule, which) for rule in ("general", "domain") for which in (0, 1)]
    cells = []
    for case, values in by_case.items():
        corpora = ("general", next(name for name in CORPORA[1:] if f", {name}, " in case))
        figures = [f"{corpus} perplexity" for corpus in corpora]
        figures += [f"{corpora[which]} perplexity against {rule}" for rule, which in pairs]
        figures += [f"{corpus}_continuation_test acc" for corpus in corpora]
        chosen = " (chosen)" * any(row["chosen"] for row in values.values())
        cells.append([case + chosen, *(_sure(values.get(figure)) for figure in figures)])
    against = [f"{('general', 'domain')[which]}, % against {rule} alone" for rule, which in pairs]
    heads = ("model, domain, part, variant", "general", "domain", *against, "general questions, %", "domain's, %")
    return markdown(heads, cells) + circumstances(rows)


def _sure(row: dict[str, Any] | None) -> str:
    """Format a value; a star marks a statistically significant difference."""
    if row is None:
        return ""
    if row.get("verdict") is None:
        return number(row["value"]) if row["spread"] is None else with_error(row["value"], row["spread"])
    return f"{row['value']:+.1f} ± {row['spread']:.1f}" + "*" * (row["verdict"] != "not distinguishable")


def chats() -> str:
    """One row per calibration text: perplexities over draws, and changes against general text and plain turns."""
    rows = read("chats")
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["figure"]] = row
    figures = [f"{corpus} perplexity" for corpus in ("general", "chats", "turns")]
    changes = [f"{figure} against {rule}" for rule in ("general", "turns") for figure in figures]
    cells = (
        [case, *(_sure(values.get(figure)) for figure in [*figures, *changes])] for case, values in by_case.items()
    )
    heads = [figure.replace(" perplexity", "").replace(" against", ", % against") for figure in [*figures, *changes]]
    return markdown(("model, variant", *heads), cells) + circumstances(rows)


def choosing() -> str:
    """Planted documents that were found, the models calibrated on the choice, and near-duplicates."""
    rows = read("choosing")
    planted = ("precision", "recall of twice as many", "processor time", "peak memory above the start")
    by_case: dict[str, dict[str, str]] = {}
    for row in rows:
        is_share = row["figure"] in planted[:2]
        text = f"{row['value']:.2f} ± {row['spread']:.2f}" if is_share and row["spread"] else number(row["value"])
        by_case.setdefault(row["case"], {})[row["figure"]] = text
    found = {case: values for case, values in by_case.items() if "precision" in values}
    heads = (
        "planted in 1,000 general documents, chosen by",
        "precision",
        "recall of twice as many",
        "processor s",
        "MiB",
    )
    table = markdown(heads, ([case, *(values.get(f, "") for f in planted)] for case, values in found.items()))
    models = {case: values for case, values in by_case.items() if any(f.endswith("perplexity") for f in values)}
    cells = ([case, *values.values()] for case, values in models.items())
    tables = [table, markdown(("SparseGPT, 70 %, calibrated on", "general", "domain"), cells)] if models else [table]
    pairs = [row for row in rows if row["case"].startswith("near-duplicates")]
    told = [f"{row['figure']}: {number(row['value'])} {row['unit']}".strip() for row in pairs]
    return "\n".join([*tables, f"{'; '.join([pairs[0]['case'], *told])}.\n"]) + circumstances(rows)


def leaks() -> str:
    """One row per set or planting, with all its figures."""
    rows = [row for row in read("sufficiency") if row["case"].startswith(("overlap", "planted"))]
    cells = ([row["case"], row["figure"], f"{number(row['value'])} {row['unit']}"] for row in rows)
    return markdown(("case", "figure", "value"), cells) + circumstances(rows)


def text_quality() -> str:
    """One row per text, one column per measure."""
    rows = [row for row in read("sufficiency") if row["case"].startswith("text: ")]
    figures = list(dict.fromkeys(row["figure"] for row in rows))
    by_case: dict[str, dict[str, str]] = {}
    for row in rows:
        by_case.setdefault(row["case"].removeprefix("text: "), {})[row["figure"]] = number(row["value"])
    cells = ([case, *(values[figure] for figure in figures)] for case, values in by_case.items())
    return markdown(("128 windows of", *figures), cells) + circumstances(rows)


VERDICTS = {
    "expected of twice as many: held-out loss": "expected of twice as many, %",
    "last doubling": "the last doubling brought, %",
    "twice as many: held-out loss": "twice as many bring: held-out loss, %",
    "twice as many: perplexity": "perplexity, %",
    "draws that say: add data": "draws that say: add data",
}


def verdicts() -> str:
    """One row per set: the predicted and the measured effect of twice as much."""
    rows = [row for row in read("sufficiency") if row["case"].endswith(" windows")]
    by_case: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = number(row["value"]) if row["spread"] is None else f"{row['value']:.1f} ± {row['spread']:.1f}"
        by_case.setdefault(row["case"], {})[row["figure"]] = (
            cell if row["unit"] in ("%", "") else f"{cell} {row['unit']}"
        )
    cells = (
        [case, *(values[f] for f in VERDICTS)] for case, values in by_case.items() if VERDICTS.keys() <= values.keys()
    )
    return markdown(("set", *VERDICTS.values()), cells) + circumstances(rows)


ALPHA = {
    "balanced: α found": "alpha, balanced",
    "best of eleven, test": "best alpha of eleven, balanced, test",
    "regret, validation": "regret, balanced, validation",
    "regret, test": "regret, balanced, test",
    "rule: α found": "alpha, rule",
    "best of those that keep it, test": "best alpha of eleven, rule, test",
    "regret, validation ": "regret, rule, validation",
    "regret, test ": "regret, rule, test",
    "broken by, test": "excess, rule, test",
    "evaluated": "evaluated, rule",
    "a tenth: general, test": "a tenth: general, test",
    "share of the domain's gain": "a tenth: share of the domain's gain, test",
    "seconds for both": "seconds for both choices",
}


def alpha() -> str:
    """One row per setting and domain."""
    rows = read("alpha")
    by_case: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = f"{row['value']:.2f} %" if row["unit"] == "%" else number(row["value"])
        by_case.setdefault(row["case"], {})[row["figure"]] = cell
    measured = {case: values for case, values in by_case.items() if case != "circumstances"}
    cells = ([case, *(values.get(figure, "") for figure in ALPHA.values())] for case, values in measured.items())
    return markdown(("model, setting, domain", *(head.strip() for head in ALPHA)), cells) + circumstances(rows)


def tasks() -> str:
    """One row per model: accuracy on each corpus, followed by the change against dense on the same questions."""
    rows = read("tasks_llama-mix-8m")
    by_case: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["figure"]] = row
    cells = []
    for case, found in by_case.items():
        cells.append([case])
        for corpus in CORPORA:
            one = found[f"{corpus} accuracy"]
            cell = f"{with_error(one['value'], one['spread'])} %"
            if f"{corpus} p" in found:
                change, lost, won, p = (
                    found[f"{corpus} {which}"]["value"] for which in ("against dense", "lost", "won", "p")
                )
                cell += f" ({change:+.1f} points, {lost} lost / {won} won, p = {p:.2g})"
            cells[-1].append(cell)
    return markdown(("model", *CORPORA), cells) + circumstances(rows)


VIEWS: dict[str, Callable[[], str]] = {
    "testbed-grid": grid,
    "tasks": tasks,
    "testbed-draws": draws,
    "peers": peers,
    "solvers": solvers,
    "solvers_one_draw": lambda: solvers("solvers_one_draw"),
    "solvers_low_rank": lambda: solvers("solvers_low_rank"),
    "allocation": allocation,
    "gradients": gradients,
    "scales": scales,
    "leaks": leaks,
    "text-quality": text_quality,
    "verdicts": verdicts,
    "real-models": real_models,
    "study": study,
    "chats": chats,
    "choosing": choosing,
    "alpha": alpha,
}


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def spread(row: dict[str, Any]) -> str:
    return number(row.get("spread"))


def rendered(text: str) -> str:
    """Return the text with every table generated again."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{match[1]}\n{VIEWS[name]() if name in VIEWS else plain(name)}\n{match[3]}"

    return MARK.sub(table, text)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit("benchmarks/README.md is behind results/: make table" if rendered(text) != text else 0)
    README.write_text(rendered(text), encoding="utf-8")


if __name__ == "__main__":
    main()
