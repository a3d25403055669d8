"""Does mixing Hessians keep both the domain and general text? Perplexities on real text, a small real model.

    python benchmarks/testbed.py TESTBED [--home STORE] [--seeds 5]

TESTBED contains `corpora/{general,biomedical,legal}` and `models/llama-mix-8m`. crosscal itself runs two plans:

* the grid: every method and setting, alpha 0, .25, .5, .75, 1 for both domains, one draw of calibration windows;
* the draws: SparseGPT at 60 %, 70 % and 2:4 and GPTQ at 3 bits, alpha 0, .5, 1, five draws each, so that differences
  are paired over draws; also with self-generated text in place of the general corpus, and with random tokens.

A row is the perplexity of one variant; the draws add mean, standard deviation, and paired differences against alpha 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from records import record, write

from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.report.rows import ResultRow, read_rows

DOMAINS = ("biomedical", "legal")
ALPHAS = [0, 0.25, 0.5, 0.75, 1]
SPARSITIES = [0.5, 0.6, 0.7, 0.8, "2:4"]
GROUP = 64  # divides the model's 256 and 704 inputs


def base(testbed: Path) -> dict[str, Any]:
    corpora = {name: str(testbed / "corpora" / name) for name in ("general", *DOMAINS)}
    return {
        "model": str(testbed / "models" / "llama-mix-8m"),
        "corpora": {**corpora, "self": "self", "random": "random"},
        "calibration": {"windows": 128, "length": 256, "held_out_windows": 32},
        "evaluate": {"windows": 48},
        "execution": {"device": "cpu", "keep_models": False},
    }


def grid(testbed: Path) -> dict[str, Any]:
    domains = {"domain": list(DOMAINS), "alpha": ALPHAS}
    return base(testbed) | {
        "compress": [
            {"method": ["magnitude", "wanda", "sparsegpt"], "sparsity": SPARSITIES, **domains},
            {"method": ["rtn", "gptq"], "bits": [4, 3, 2], "group_size": GROUP, **domains},
            {
                "method": "sparsegpt",
                "sparsity": [0.6, 0.7],
                "domain": list(DOMAINS),
                "alpha": [0, 0.5],
                "upstream": "sequential",
            },
        ]
    }


def draws(testbed: Path, seeds: int) -> dict[str, Any]:
    mixtures: list[dict[str, float]] = [{"general": 1}, {"self": 1}, {"random": 1}]
    for domain in DOMAINS:
        mixtures += [{"general": 0.5, domain: 0.5}, {domain: 1}, {"self": 0.5, domain: 0.5}]
    plan = base(testbed) | {
        "compress": [
            {"method": "sparsegpt", "sparsity": [0.6, 0.7, "2:4"], "mixture": mixtures},
            {"method": "gptq", "bits": 3, "group_size": GROUP, "mixture": mixtures},
        ]
    }
    plan["calibration"]["seed"] = list(range(seeds))
    return plan


def run(plan: dict[str, Any], home: str, out: str) -> list[ResultRow]:
    record_of_run = carry_out(parse_plan(plan), home, out)
    rows = read_rows(Path(record_of_run["run_dir"]) / "results.jsonl", ResultRow)
    return [row for row in rows if row.split == "test"]


def grid_rows(results: list[ResultRow]) -> list[dict[str, Any]]:
    return [
        record(f"grid {row.variant}", f"{row.corpus_or_task} perplexity", row.value, "perplexity", row.stderr)
        for row in results
        if row.value is not None
    ]


def draw_rows(results: list[ResultRow]) -> list[dict[str, Any]]:
    """Mean and standard deviation over draws, and the paired change of perplexity against general-only, in percent."""
    values: dict[tuple[str, str, str], dict[int | None, float]] = defaultdict(dict)
    for row in results:
        if row.method != "dense" and row.value is not None:
            mixture = json.dumps(row.mixture, sort_keys=True)
            values[setting(row), mixture, row.corpus_or_task][row.seed] = row.value
    rows = []
    for (name, mixture, corpus), by_seed in values.items():
        case = f"draws {name} {label(json.loads(mixture))}"
        spread = statistics.stdev(by_seed.values())
        rows.append(record(case, f"{corpus} perplexity", statistics.mean(by_seed.values()), "perplexity", spread))
        general = values[name, '{"general": 1.0}', corpus]
        if general is not by_seed:
            percent = [100 * (by_seed[seed] / general[seed] - 1) for seed in by_seed]
            rows.append(
                record(case, f"{corpus} against general", statistics.mean(percent), "%", statistics.stdev(percent))
            )
    return rows


def setting(row: ResultRow) -> str:
    return (
        f"{row.method} {row.setting['sparsity'] if 'sparsity' in row.setting else str(row.setting['bits']) + ' bits'}"
    )


def label(mixture: dict[str, float]) -> str:
    return " + ".join(f"{weight:g} {name}" if weight < 1 else name for name, weight in sorted(mixture.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--home", default=".crosscal-testbed")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    testbed, home = arguments.testbed.resolve(), arguments.home
    write("testbed_grid", grid_rows(run(grid(testbed), home, f"{home}/runs/grid")))
    write("testbed_draws", draw_rows(run(draws(testbed, arguments.seeds), home, f"{home}/runs/draws")))


if __name__ == "__main__":
    main()
