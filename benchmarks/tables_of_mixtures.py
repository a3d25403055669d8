"""Tables about mixtures: the grid and the draws of the test bed, the studies, `auto`, questions."""

from __future__ import annotations

from typing import Any

from table_cells import CORPORA, Row, cases, circumstances, markdown, number, read

from crosscal.report.numbers import with_error


def grid() -> str:
    """One row per variant, one column per corpus; ± is the standard error over test windows."""
    rows = read("testbed_grid")
    figures = [f"{corpus} perplexity" for corpus in CORPORA]
    by_case = cases(rows, lambda row: with_error(row["value"], row["spread"]))
    cells = ([case.removeprefix("grid "), *(values.get(f, "–") for f in figures)] for case, values in by_case.items())
    return markdown(("variant", *CORPORA), cells) + circumstances(rows)


def draws() -> str:
    """Mean ± standard deviation over draws, and the paired change against general-only calibration."""
    rows = read("testbed_draws")

    def cell(row: Row) -> str:
        digits = "{:+.1f} ± {:.1f} %" if row["unit"] == "%" else "{:.1f} ± {:.1f}"
        return digits.format(row["value"], row["spread"])

    headers = ["setting, mixture"]
    figures = []
    for corpus in CORPORA:
        headers += [corpus, f"{corpus}, change"]
        figures += [f"{corpus} perplexity", f"{corpus} against general"]
    by_case = cases(rows, cell)
    cells = ([case.removeprefix("draws "), *(values.get(f, "") for f in figures)] for case, values in by_case.items())
    return markdown(headers, cells) + circumstances(rows)


def study() -> str:
    """One row per variant: perplexities over draws, and changes against general text alone and the domain alone."""
    rows = read("study")
    by_case = cases(rows)
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


def chats() -> str:
    """One row per calibration text: perplexities over draws, and changes against general text and plain turns."""
    rows = read("chats")
    by_case = cases(rows)
    figures = [f"{corpus} perplexity" for corpus in ("general", "chats", "turns")]
    changes = [f"{figure} against {rule}" for rule in ("general", "turns") for figure in figures]
    cells = (
        [case, *(_sure(values.get(figure)) for figure in [*figures, *changes])] for case, values in by_case.items()
    )
    heads = [figure.replace(" perplexity", "").replace(" against", ", % against") for figure in [*figures, *changes]]
    return markdown(("model, variant", *heads), cells) + circumstances(rows)


def _sure(row: dict[str, Any] | None) -> str:
    """Format a value; a star marks a statistically significant difference."""
    if row is None:
        return ""
    if row.get("verdict") is None:
        return number(row["value"]) if row["spread"] is None else with_error(row["value"], row["spread"])
    return f"{row['value']:+.1f} ± {row['spread']:.1f}" + "*" * (row["verdict"] != "not distinguishable")


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
    by_case = cases(rows, lambda row: f"{row['value']:.2f} %" if row["unit"] == "%" else number(row["value"]))
    measured = {case: values for case, values in by_case.items() if case != "circumstances"}
    cells = ([case, *(values.get(figure, "") for figure in ALPHA.values())] for case, values in measured.items())
    return markdown(("model, setting, domain", *(head.strip() for head in ALPHA)), cells) + circumstances(rows)


def tasks() -> str:
    """One row per model: accuracy on each corpus, followed by the change against dense on the same questions."""
    rows = read("tasks_llama-mix-8m")
    by_case = cases(rows)
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
