"""Tables about calibration text: chosen documents, leaks, quality, whether it is enough."""

from __future__ import annotations

from table_cells import Row, cases, circumstances, markdown, number, read


def choosing() -> str:
    """Planted documents that were found, the models calibrated on the choice, and near-duplicates."""
    rows = read("choosing")
    planted = ("precision", "recall of twice as many", "processor time", "peak memory above the start")

    def cell(row: Row) -> str:
        is_share = row["figure"] in planted[:2]
        return f"{row['value']:.2f} ± {row['spread']:.2f}" if is_share and row["spread"] else number(row["value"])

    by_case = cases(rows, cell)
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
    by_case = cases(rows, lambda row: number(row["value"]))
    cells = ([case.removeprefix("text: "), *(values[f] for f in figures)] for case, values in by_case.items())
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

    def cell(row: Row) -> str:
        text = number(row["value"]) if row["spread"] is None else f"{row['value']:.1f} ± {row['spread']:.1f}"
        return text if row["unit"] in ("%", "") else f"{text} {row['unit']}"

    complete = ((case, values) for case, values in cases(rows, cell).items() if VERDICTS.keys() <= values.keys())
    cells = ([case, *(values[figure] for figure in VERDICTS)] for case, values in complete)
    return markdown(("set", *VERDICTS.values()), cells) + circumstances(rows)
