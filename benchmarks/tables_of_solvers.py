"""Tables about methods: peers, solvers, allocators, gradients, scales."""

from __future__ import annotations

from collections.abc import Mapping

from table_cells import CORPORA, cases, circumstances, markdown, number, read


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
    by_case = cases((row for row in rows if row["figure"] in figures), lambda row: number(row["value"]))
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
    by_case = cases(rows, lambda row: number(row["value"]))
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
    by_case = cases(rows, lambda row: row["value"])
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
    by_case = cases((row for row in rows if row["figure"].endswith(" perplexity")), lambda row: row["value"])
    dense, cells = by_case.pop("dense"), []
    for name in dict.fromkeys(case.rpartition(",")[0] for case in by_case):
        both = [(domain, corpus) for domain in CORPORA[1:] for corpus in ("general", domain)]
        found = [(f"{corpus} perplexity", by_case[f"{name}, {domain}"]) for domain, corpus in both]
        cells.append([name, *(f"{number(v[c])} ({100 * (v[c] / dense[c] - 1):+.1f} %)" for c, v in found)])
    costs = [f"{row['case']}, {row['figure']}: {number(row['value'])} {row['unit']}".strip() for row in rows[:5]]
    heads = ("method", "half biomedical: general", "biomedical", "half legal: general", "legal")
    return markdown(heads, cells) + f"\n{'; '.join(costs)}.\n" + circumstances(rows)
