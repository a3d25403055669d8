"""Claim: summing Hessians runs at 80 % or more of a plain matrix product's speed, counting half the product.

    python benchmarks/accumulation.py [--tokens 4096] [--repeats 9] [--threads 2]

`MomentsAccumulator.add` for T tokens of I inputs needs T I (I + 1) operations, half of the product XᵀX, besides its
vectors of sums. As in a calibration pass, each worker thread has its own batch; their total rate is compared with that
of `X.mT @ X`, 2 T I² operations on all threads, in float32, the two alternating.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from records import load_average, median_record, record, write

from crosscal.lanes import side_by_side
from crosscal.statistics import MomentsAccumulator
from crosscal.statistics.blas import BLAS

WIDTHS = (512, 1408, 2048, 4096)


def seconds(action: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - started) / calls


def rates(inputs: int, tokens: int, repeats: int) -> tuple[list[float], list[float]]:
    """Return FLOP/s of the plain product and of the accumulators on all worker threads, per repeat."""
    lanes = torch.get_num_threads()
    input_TI = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0))
    product_II = torch.empty(inputs, inputs)
    accumulators = [MomentsAccumulator(inputs) for _ in range(lanes)]

    def plain() -> torch.Tensor:
        return torch.mm(input_TI.mT, input_TI, out=product_II)

    def accumulate(accumulator: MomentsAccumulator) -> None:
        for _ in range(calls):
            accumulator.add(input_TI)

    def in_lanes() -> None:
        with BLAS.one_thread():
            side_by_side([partial(accumulate, accumulator) for accumulator in accumulators], threads_each=1)

    calls = max(1, round(0.2 / max(seconds(plain, 3), 1e-4)))
    seconds(in_lanes, 1)
    plain_rates, own_rates = [], []
    for _ in range(repeats):
        plain_rates.append(2 * tokens * inputs**2 / seconds(plain, calls))
        own_rates.append(lanes * calls * tokens * inputs * (inputs + 1) / seconds(in_lanes, 1))
    return plain_rates, own_rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [record("circumstances", "load average before", load_average(), "processes")]
    for inputs in WIDTHS:
        plain, own = rates(inputs, options.tokens, options.repeats)
        case = f"{inputs} inputs, {options.tokens} tokens a call"
        rows += [
            median_record(case, "plain product", [rate / 1e9 for rate in plain], "GFLOP/s"),
            median_record(case, "accumulator, half the product", [rate / 1e9 for rate in own], "GFLOP/s"),
            median_record(case, "accumulator over plain", [b / a for a, b in zip(plain, own, strict=True)], "ratio"),
        ]
        print(f"{case}: {rows[-1]['value']:.3f} ± {rows[-1]['spread']:.3f} of {rows[-3]['value']:.0f} GFLOP/s")
    write("accumulation", rows)


if __name__ == "__main__":
    main()
