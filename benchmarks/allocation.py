"""What allocating a sparsity to the blocks (OWL, DLP) gains: real text, a small real model, one draw.

    python benchmarks/allocation.py TESTBED [--home STORE]

TESTBED contains `corpora/{general,legal}` and `models/llama-mix-8m`. SparseGPT (or ALPS) at 70 %, half general and half
legal text (alpha .5), run by crosscal itself. Rows: test perplexities, the lowest and the highest block sparsity.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from records import record, write

from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.report.rows import LayerRow, ResultRow, read_rows

CORPORA = ("general", "legal")
SPARSEGPT, ALPS = ({"method": method, "sparsity": 0.7} for method in ("sparsegpt", "alps"))
RECIPES: dict[str, list[dict[str, Any]]] = {
    "none": [SPARSEGPT],
    "owl": [{"method": "owl"}, SPARSEGPT],
    "owl, per layer": [{"method": "owl", "per": "layer"}, SPARSEGPT],
    "dlp": [{"method": "dlp"}, SPARSEGPT],
    "dlp, spread .05": [{"method": "dlp", "spread": 0.05}, SPARSEGPT],
    "dlp, per layer": [{"method": "dlp", "per": "layer"}, SPARSEGPT],
    "none, alps": [ALPS],
    "owl, alps": [{"method": "owl"}, ALPS],
}


def plan_of(testbed: Path) -> dict[str, Any]:
    return {
        "model": str(testbed / "models" / "llama-mix-8m"),
        "corpora": {name: str(testbed / "corpora" / name) for name in CORPORA},
        "calibration": {"windows": 128, "length": 256, "held_out_windows": 32},
        "compress": [{"steps": steps, "domain": "legal", "alpha": 0.5} for steps in RECIPES.values()],
        "evaluate": {"windows": 48},
        "execution": {"device": "cpu", "keep_models": False},
    }


def block_sparsities(layers: list[LayerRow]) -> list[float]:
    """Return the share of zeros among each block's weights."""
    zeros, weights = defaultdict(float), defaultdict(int)
    for row in layers:
        zeros[row.block] += row.sparsity * (row.parameters or 0)
        weights[row.block] += row.parameters or 0
    return [zeros[block] / weights[block] for block in sorted(zeros)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--home", default=".crosscal-solvers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = plan_of(arguments.testbed.resolve())
    done = carry_out(parse_plan(plan), arguments.home, f"{arguments.home}/runs/allocation")
    rows_of_run = read_rows(Path(done["run_dir"]) / "results.jsonl", ResultRow)
    results = [row for row in rows_of_run if row.split == "test"]
    layers = read_rows(Path(done["run_dir"]) / "layers.jsonl", LayerRow)
    names = list(dict.fromkeys(row.variant for row in results if row.method != "dense"))
    rows = []
    for case, variant in [("dense", "dense"), *zip(RECIPES, names, strict=True)]:
        for row in results:
            if row.variant == variant and row.value is not None:
                rows.append(record(case, f"{row.corpus_or_task} perplexity", row.value, ""))
        if variant != "dense":
            own = [layer for layer in layers if layer.variant == variant]
            sparsities = block_sparsities(own)
            rows.append(record(case, "lowest sparsity of a block", min(sparsities), ""))
            rows.append(record(case, "highest sparsity of a block", max(sparsities), ""))
            total = sum(layer.sparsity * (layer.parameters or 0) for layer in own)
            rows.append(record(case, "sparsity", total / sum(layer.parameters or 0 for layer in own), ""))
            print(case, [round(each, 4) for each in sparsities])
    write("allocation", rows)


if __name__ == "__main__":
    main()
