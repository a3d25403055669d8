"""What scales moved into norms (AWQ) gain from the same statistics, before plain rounding and before GPTQ.

    python benchmarks/scales.py TESTBED [--home STORE] [--seeds 1] [--bits 4 3]

As `solvers.py`: the small Llama, half general and half domain text (alpha .5), groups of 64; a row is the mean over
draws, both domains and, for losses, matrices. Ratios are to plain rounding at the same bits. The losses of the matrices
that can be scaled, those that read a norm's output, are also reported separately.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from records import record, write
from solvers import GROUP, measured, rows_of

from crosscal.report.rows import LayerRow, read_rows
from crosscal.warm_up import warm_up

RECIPES = {
    "rtn": ["awq off", "rtn"],
    "awq+rtn": ["awq", "rtn"],
    "gptq plain": ["gptq plain"],
    "awq+gptq plain": ["awq", "gptq plain"],
    "gptq": ["gptq"],
    "awq+gptq": ["awq", "gptq"],
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "gptq plain": {"activation_order": False, "scale_search": False},  # as published
    "awq off": {"points": 1},  # exponent 0 only: plain rounding, with losses measured on the mixture
}


def step(method: str, bits: int) -> dict[str, Any]:
    return {"method": method.split()[0], "bits": bits, "group_size": GROUP, **OTHERWISE.get(method, {})}


def reached(runs: Path) -> float:
    """Return the mean relative loss of the matrices that read a norm's output."""
    rows = [row for file in sorted(runs.rglob("layers.jsonl")) for row in read_rows(file, LayerRow)]
    sites = ("self_attn.q_proj", "mlp.gate_proj")
    return statistics.mean(row.relative_loss for row in rows if row.site in sites)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--home", default=".crosscal-scales")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    rows: list[dict[str, Any]] = []
    for bits in arguments.bits:
        base, reached_base = None, None
        for name, methods in RECIPES.items():
            level, entry = f"{bits} bits", {"steps": [step(method, bits) for method in methods]}
            out = f"{arguments.home}/runs/scales-{name}-{level}".replace(" ", "_")
            numbers = measured(
                arguments.testbed.resolve(), arguments.home, "scales", name, level, entry, arguments.seeds
            )
            base = base or numbers
            rows += rows_of(f"{name}, {level}", numbers, base)
            loss = reached(Path(out))
            reached_base = reached_base or loss
            rows.append(record(f"{name}, {level}", "loss behind norms", loss, ""))
            if base is not numbers:
                rows.append(record(f"{name}, {level}", "loss behind norms over base", loss / reached_base, ""))
            write("scales", rows)
            print(f"{name}, {level}: loss behind norms {loss:.5g}", flush=True)


if __name__ == "__main__":
    main()
