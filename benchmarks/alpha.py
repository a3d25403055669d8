"""How good is the weight that `alpha: auto` finds, compared with the best of eleven evaluated weights?

    python benchmarks/alpha.py TESTBED [MODEL] [--home STORE] [--settings prune60 ...] [--domains biomedical legal]
                               [--windows 128] [--length 256] [--within 0.02] [--seeds 0]

TESTBED contains `corpora/{general,biomedical,legal}` and `models/llama-mix-8m`; MODEL, a folder, replaces that model.
For each setting and domain crosscal runs one plan: alpha 0, .1, … 1, `auto`, and `auto` with the rule that general
perplexity is at most `--within` above general-only's on validation windows. All are measured on validation and on test
windows. Regret, in percent of perplexity:

* balanced: the product of general and domain perplexity, relative to the smallest of the eleven;
* rule: domain perplexity, relative to the lowest among those of the eleven that keep the rule on the same windows (on
  test windows: that keep it there). "excess": by how much the chosen weight breaks the rule on test windows.

With several draws (`--seeds`), weights are found for each draw. The balanced regret then compares geometric means over
draws, `auto`'s with those of the best single weight for all draws: in one draw the smallest of eleven is also the
luckiest. Other figures are means, except the excess, which is the maximum.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from records import load_average, log_progress, record, write

from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.report.rows import ResultRow, read_rows
from crosscal.warm_up import warm_up

ALPHAS = [round(0.1 * step, 1) for step in range(11)]
SETTINGS: dict[str, dict[str, Any]] = {
    "prune50": {"method": "sparsegpt", "sparsity": 0.5},
    "prune60": {"method": "sparsegpt", "sparsity": 0.6},
    "prune70": {"method": "sparsegpt", "sparsity": 0.7},
    "round2": {"method": "gptq", "bits": 2, "group_size": 64},
    "round3": {"method": "gptq", "bits": 3, "group_size": 64},
}
SPLITS = ("validation", "test")
Perplexities = dict[float | str, dict[tuple[str, str], float]]
"""alpha, or "auto" and "rule" -> (corpus, split) -> perplexity."""


def plan_of(options: argparse.Namespace, setting: str, domain: str, seed: int) -> dict[str, Any]:
    model = options.model or options.testbed / "models" / "llama-mix-8m"
    rule = {"auto": {"general_within": options.within}}
    return {
        "model": str(model),
        "corpora": {name: str(options.testbed / "corpora" / name) for name in ("general", domain)},
        "calibration": {
            "windows": options.windows,
            "length": options.length,
            "held_out_windows": max(16, options.windows // 4),
            "seed": seed,
        },
        "compress": [{**SETTINGS[setting], "domain": domain, "alpha": [*ALPHAS, "auto", rule]}],
        "evaluate": {"windows": options.test_windows, "validation_windows": options.validation_windows},
        "execution": {"device": "cpu", "keep_models": False},
    }


def perplexities(run_dir: Path, domain: str) -> Perplexities:
    found: Perplexities = {}
    for row in read_rows(run_dir / "results.jsonl", ResultRow):
        if row.metric != "perplexity" or row.value is None:
            continue
        kind: float | str = round(row.mixture.get(domain, 0.0), 3)
        if row.found_by is not None:
            kind = "rule" if "within" in row.found_by else "auto"
        kind = "dense" if row.method == "dense" else kind
        found.setdefault(kind, {})[row.corpus_or_task, row.split] = row.value
    return found


def figures(found: Perplexities, choices: list[dict[str, Any]], domain: str, within: float) -> dict[str, float]:
    """Return the figures of one setting and domain, in percent except weights and counts."""
    between, ruled = choices
    numbers = {
        "alpha, balanced": between["weights"].get(domain, 0.0),
        "alpha, rule": ruled["weights"].get(domain, 0.0),
        "solved, balanced": len(between["tried"]),
        "evaluated, rule": sum(bool(one["perplexity"]) for one in ruled["tried"]) - 1,
    }
    for split in SPLITS:

        def of_domain(kind: float | str, split: str = split) -> float:
            return found[kind][domain, split]

        def excess(kind: float | str, split: str = split) -> float:
            return found[kind]["general", split] / found[0.0]["general", split] - 1 - within

        kept = [alpha for alpha in ALPHAS if alpha == 0 or excess(alpha) <= 0]
        allowed = min(kept, key=of_domain)
        numbers |= {
            f"best alpha of eleven, rule, {split}": allowed,
            f"regret, rule, {split}": 100 * (of_domain("rule") / of_domain(allowed) - 1),
            f"excess, rule, {split}": 100 * max(0.0, excess("rule")),
        }
        gain = math.log(of_domain(0.0) / of_domain(min(ALPHAS, key=of_domain)))
        tenth = math.log(of_domain(0.0) / of_domain(0.1))
        numbers[f"a tenth: general, {split}"] = 100 * (found[0.1]["general", split] / found[0.0]["general", split] - 1)
        numbers[f"a tenth: share of the domain's gain, {split}"] = 100 * tenth / gain if gain > 0 else 0.0
    return numbers


def balanced(found: Perplexities, domain: str) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for split in SPLITS:
        products = {kind: each["general", split] * each[domain, split] for kind, each in found.items()}
        best = min(ALPHAS, key=products.__getitem__)
        numbers[f"best alpha of eleven, balanced, {split}"] = best
        numbers[f"regret, balanced, {split}"] = 100 * (products["auto"] / products[best] - 1)
    return numbers


def pooled(draws: list[Perplexities]) -> Perplexities:
    """Return geometric means over draws."""
    return {
        kind: {text: statistics.geometric_mean([draw[kind][text] for draw in draws]) for text in texts}
        for kind, texts in draws[0].items()
    }


def over_draws(draws: list[dict[str, float]]) -> dict[str, float]:
    joined = {figure: [draw[figure] for draw in draws] for figure in draws[0]}
    return {name: max(each) if name.startswith("excess") else statistics.mean(each) for name, each in joined.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--home", default=".crosscal-alpha")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=["prune60", "prune70", "round2"])
    parser.add_argument("--domains", nargs="*", default=["biomedical", "legal"])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--test-windows", type=int, default=48)
    parser.add_argument("--validation-windows", type=int, default=32)
    parser.add_argument("--within", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    options.testbed = options.testbed.resolve()
    log_progress()
    torch.set_num_threads(1)
    warm_up()
    name = options.model.resolve().name if options.model else "llama-mix-8m"
    started, rows = time.monotonic(), [record("circumstances", "load average before", load_average(), "processes")]
    for setting in options.settings:
        for domain in options.domains:
            found, draws = [], []
            for seed in options.seeds:
                out = f"{options.home}/runs/{name}-{setting}-{domain}-{seed}"
                done = carry_out(parse_plan(plan_of(options, setting, domain, seed)), options.home, out)
                found.append(perplexities(Path(done["run_dir"]), domain))
                seconds = {"seconds for both choices": done["stages"]["mixtures"]}
                draws.append(figures(found[-1], done["choices"], domain, options.within) | seconds)
            numbers = over_draws(draws) | balanced(pooled(found), domain)
            case = f"{name}, {setting}, {domain}" + (f", {len(draws)} draws" if len(draws) > 1 else "")
            rows += [record(case, figure, value, unit_of(figure)) for figure, value in numbers.items()]
            write("alpha", rows, keep=True)
            print(f"{time.monotonic() - started:6.0f} s  {case}: {json.dumps(numbers)}", flush=True)


def unit_of(figure: str) -> str:
    if figure.startswith(("alpha", "best alpha")):
        return ""
    return "s" if figure.startswith("seconds") else "" if figure.startswith(("solved", "evaluated")) else "%"


if __name__ == "__main__":
    main()
