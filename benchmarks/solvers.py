"""What better solvers gain from the same Hessians, and what they cost: real text, a small real model.

    python benchmarks/solvers.py TESTBED [--home STORE] [--seeds 5] [--sparsities 0.5 0.6 0.7 0.8 2:4] [--bits 4 3 2]
                                 [--without "sparsegpt+refit exact" ...] [--rank 16] [--claim solvers]

TESTBED contains `corpora/{general,biomedical,legal}` and `models/llama-mix-8m`. crosscal itself solves every recipe
from the stored Hessians, half general and half domain text (alpha .5). A row is the mean over draws, both domains and,
for losses, matrices; damage is perplexity over dense, minus one. Ratios are to SparseGPT's or plain GPTQ's numbers of
the same draw. Seconds: mixing and solving all blocks for one recipe, on one thread. `--rank` adds recipes with a
low-rank part, whose ratios are to SparseGPT with `refit` and `eora`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from records import record, write

from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.report.rows import LayerRow, ResultRow, read_rows
from crosscal.warm_up import warm_up

DOMAINS = ("biomedical", "legal")
FIGURES = ("layer loss", "held-out loss", "general damage", "domain damage", "seconds")
GROUP = 64  # divides the model's 256 and 704 inputs
PRUNERS: dict[str, list[dict[str, Any]]] = {
    "sparsegpt": [{"method": "sparsegpt"}],
    "sparsegpt+refit": [{"method": "sparsegpt"}, {"method": "refit"}],
    "sparsegpt+refit exact": [{"method": "sparsegpt"}, {"method": "refit", "iterations": None, "damping": 1e-4}],
    "sparsegpt+swaps+refit": [{"method": "sparsegpt"}, {"method": "swaps"}, {"method": "refit"}],
    "alps": [{"method": "alps"}],
}
WITH_LOW_RANK: dict[str, list[dict[str, Any]]] = {
    "sparsegpt+refit+eora": [{"method": "sparsegpt"}, {"method": "refit"}, {"method": "eora"}],
    "alps+eora": [{"method": "alps"}, {"method": "eora"}],
    "3basil": [{"method": "3basil"}],
}
SHOWN_ONCE = ("sparsegpt+refit exact", "sparsegpt+swaps+refit")
"""Slow, so only at 70 %: one Cholesky per row, or a pass over the mask for every swap."""
ROUNDERS: dict[str, list[dict[str, Any]]] = {
    "gptq plain": [{"method": "gptq", "activation_order": False, "scale_search": False}],
    "gptq search": [{"method": "gptq", "activation_order": False}],
    "gptq": [{"method": "gptq"}],
    "gptq+scales+descent": [{"method": "gptq"}, {"method": "scales"}, {"method": "descent"}],
    "gptq+2x": [{"method": "gptq"}, *[{"method": "scales"}, {"method": "descent"}] * 2],
}


def entries(
    sparsities: Sequence[Any], bits: Sequence[int], without: Sequence[str], rank: int | None
) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Return (family, recipe, level, plan entry) of each run."""
    found = []
    for level in sparsities:
        for name, steps in PRUNERS.items():
            if name in without or (name in SHOWN_ONCE and level != 0.7):
                continue
            steps = [dict(step) for step in steps]
            steps[0]["sparsity"] = level
            if level == "2:4":
                steps = [{**step, "group": 4} if step["method"] == "swaps" else step for step in steps]
            found.append(("prune", name, str(level), {"steps": steps}))
        for name, steps in WITH_LOW_RANK.items() if rank else ():
            steps = [dict(step) for step in steps]
            steps[0]["sparsity"], steps[-1]["rank"] = level, rank
            found.append(("low rank", f"{name} {rank}", str(level), {"steps": steps}))
    for level in bits:
        for name, steps in ROUNDERS.items():
            if name in without:
                continue
            steps = [
                {**step, "bits": level, "group_size": GROUP} if "gptq" in step["method"] else step for step in steps
            ]
            found.append(("round", name, f"{level} bits", {"steps": steps}))
    return found


def plan_of(testbed: Path, entry: dict[str, Any], seeds: int) -> dict[str, Any]:
    corpora = {name: str(testbed / "corpora" / name) for name in ("general", *DOMAINS)}
    return {
        "model": str(testbed / "models" / "llama-mix-8m"),
        "corpora": corpora,
        "calibration": {"windows": 128, "length": 256, "held_out_windows": 32, "seed": list(range(seeds))},
        "compress": [{**entry, "domain": list(DOMAINS), "alpha": 0.5}],
        "evaluate": {"windows": 48},
        "execution": {"device": "cpu", "keep_models": False},
    }


def measured(testbed: Path, home: str, family: str, name: str, level: str, entry: dict[str, Any], seeds: int):
    """Run one recipe at one level; (draw, domain) -> numbers."""
    out = f"{home}/runs/{family}-{name}-{level}".replace(" ", "_").replace(":", "of")
    done = carry_out(parse_plan(plan_of(testbed, entry, seeds)), home, out)
    return numbers_of(Path(done["run_dir"]))


def numbers_of(run_dir: Path) -> dict[tuple[int, str], dict[str, float]]:
    """Numbers of a finished run of one recipe at one level: (draw, domain) -> numbers."""
    results = [row for row in read_rows(run_dir / "results.jsonl", ResultRow) if row.split == "test"]
    layers = read_rows(run_dir / "layers.jsonl", LayerRow)
    dense = {row.corpus_or_task: row.value for row in results if row.method == "dense"}
    numbers: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for row in results:
        if row.method == "dense" or row.value is None:
            continue
        domain = next(corpus for corpus in row.mixture if corpus != "general")
        if row.corpus_or_task in ("general", domain):
            kind = "general" if row.corpus_or_task == "general" else "domain"
            numbers[row.seed, domain][f"{kind} perplexity"] = row.value
            numbers[row.seed, domain][f"{kind} damage"] = row.value / dense[row.corpus_or_task] - 1
            mine = [layer for layer in layers if layer.variant == row.variant]
            numbers[row.seed, domain]["layer loss"] = statistics.mean(layer.relative_loss for layer in mine)
            held_out = [layer.heldout_relative_loss for layer in mine if layer.heldout_relative_loss is not None]
            numbers[row.seed, domain]["held-out loss"] = statistics.mean(held_out)
    seconds = sum(layer.seconds for layer in layers) / len(numbers)
    for one in numbers.values():
        one["seconds"] = seconds
    return numbers


def rows_of(case: str, numbers: dict, base: dict | None, figures: Sequence[str] = FIGURES) -> list[dict[str, Any]]:
    """Return means and standard deviations over draws and domains; ratios are per draw and domain."""
    rows = []
    for figure in figures:
        values = [one[figure] for one in numbers.values()]
        unit = "s" if figure == "seconds" else "%" if "damage" in figure else ""
        scale = 100 if unit == "%" else 1
        spread = statistics.stdev(values) * scale if len(values) > 1 else None
        rows.append(record(case, figure, statistics.mean(values) * scale, unit, spread))
        if base is not None and base is not numbers:
            ratios = [one[figure] / base[key][figure] for key, one in numbers.items()]
            spread = statistics.stdev(ratios) if len(ratios) > 1 else None
            rows.append(record(case, f"{figure} over base", statistics.mean(ratios), "", spread))
    return rows


def picture(points: list[tuple[str, str, float, float]], file: Path) -> None:
    """Plot damage in general text against seconds, one line per level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for level in dict.fromkeys(level for level, *_ in points):
        own = sorted(((s, d, name) for of, name, s, d in points if of == level), key=lambda point: point[0])
        axes.plot([s for s, *_ in own], [d for _, d, _ in own], "o-", label=level)
        for s, d, name in own:
            axes.annotate(name, (s, d), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(
        xscale="log", yscale="log", xlabel="seconds for the whole model, one thread", ylabel="damage, general text, %"
    )
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--home", default=".crosscal-solvers")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sparsities", nargs="*", default=["0.5", "0.6", "0.7", "0.8", "2:4"])
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--rank", type=int, help="of a low-rank part")
    parser.add_argument("--claim", default="solvers", help="name of the result file")
    parser.add_argument("--without", nargs="*", default=[], metavar="RECIPE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    testbed = arguments.testbed.resolve()
    sparsities = [level if ":" in level else float(level) for level in arguments.sparsities]
    rows, points, bases, started = [], [], {}, time.monotonic()
    for family, name, level, entry in entries(sparsities, arguments.bits, arguments.without, arguments.rank):
        numbers = measured(testbed, arguments.home, family, name, level, entry, arguments.seeds)
        base = bases.setdefault((family, level), numbers)
        case = f"{name}, {level}"
        rows += rows_of(case, numbers, base)
        mean = {
            figure: statistics.mean(one[figure] for one in numbers.values()) for figure in ("seconds", "general damage")
        }
        points.append((level, name, mean["seconds"], 100 * mean["general damage"]))
        print(f"{time.monotonic() - started:6.0f} s  {case}: {points[-1][2]:.1f} s, {points[-1][3]:.2f} %", flush=True)
        write(arguments.claim, rows)
        picture(points, Path(__file__).parent / "results" / f"{arguments.claim}.png")


if __name__ == "__main__":
    main()
