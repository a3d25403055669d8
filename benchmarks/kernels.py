"""Claim: the column loop of a panel, compiled, takes a fraction of the time of the same loop in plain torch.

    python benchmarks/kernels.py [--repeats 9]

One panel of 128 columns and 2816 rows (gate and up of the peers' reference Llama, stacked), on one thread, the compiled
loop and its torch twin alternating; nanoseconds per weight, medians, with half ranges as spread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from records import load_average, median_record, record, write

from crosscal.compressors.numba_panel import fix_panel_numba
from crosscal.compressors.panel import FixedPanel, NMPattern, Panel, Rounding, fix_panel_torch

COLUMNS, ROWS, CALLS = 128, 2816, 5


def panels() -> dict[str, Panel]:
    torch.manual_seed(0)
    weight_CR = torch.randn(COLUMNS, ROWS)
    upper_CC = torch.randn(COLUMNS, COLUMNS).triu(1) * 0.1 + torch.eye(COLUMNS)
    root_C = upper_CC.diagonal().reciprocal()
    drop_CR = (torch.rand(COLUMNS, ROWS) < 0.5).float()
    grid = Rounding(0.1 + torch.rand(COLUMNS, ROWS), torch.full((ROWS,), 4.0), torch.bfloat16)
    everything = [NMPattern(slice(0, ROWS), 2, 4)]
    return {
        "prune 50 %": Panel(weight_CR, upper_CC, root_C, root_C, drop_CR),
        "prune 2:4": Panel(weight_CR, upper_CC, root_C, root_C, torch.zeros_like(drop_CR), everything),
        "round to 4 bits": Panel(weight_CR, upper_CC, root_C, root_C, rounding=grid),
    }


def nanoseconds(fix: Callable[[Panel], FixedPanel], panel: Panel) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        fix(panel)
    return (time.perf_counter() - started) / (CALLS * COLUMNS * ROWS) * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = [record("circumstances", "load average before", load_average(), "processes")]
    for case, panel in panels().items():
        pairs = [(nanoseconds(fix_panel_torch, panel), nanoseconds(fix_panel_numba, panel)) for _ in range(repeats + 1)]
        plain, compiled = zip(*pairs[1:], strict=True)  # the first pair compiles and warms up
        rows += [
            median_record(case, "plain torch", plain, "ns a weight"),
            median_record(case, "compiled", compiled, "ns a weight"),
            median_record(case, "plain over compiled", [a / b for a, b in pairs[1:]], "ratio"),
        ]
        print(f"{case}: {rows[-3]['value']:.1f} and {rows[-2]['value']:.1f} ns a weight, ratio {rows[-1]['value']:.1f}")
    write("kernels", rows)


if __name__ == "__main__":
    main()
