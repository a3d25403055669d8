"""Claim: moments are stored without loss in less than half of their matrix, at the speed of a fast disk.

    python benchmarks/codec.py [--repeats 9]

Gram matrices of correlated inputs with log-normal scales are written and read back in the Arrow format of
`crosscal.store.moments`, in the page cache and without the store's digests. Speeds are megabytes of the full float32
matrix per second, median over the repeats; the spread is their standard deviation.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import records
import torch

from crosscal.statistics import InputMoments, Statistic
from crosscal.store import moments as codec

INPUTS, TOKENS = (2048, 4096), 4096


def made(inputs: int) -> InputMoments:
    chance = torch.Generator().manual_seed(0)
    mixing_II = torch.eye(inputs) + torch.randn(inputs, inputs, generator=chance) / inputs**0.5
    scale_I = torch.randn(inputs, generator=chance).exp()
    return InputMoments.of(torch.randn(TOKENS, inputs, generator=chance) @ mixing_II * scale_I)


def measured(moments: InputMoments, folder: Path) -> tuple[float, float]:
    """Return seconds to write and to read."""
    start = time.perf_counter()
    codec.write_moments(folder, moments)
    written = time.perf_counter()
    exponents = codec._read_vectors(folder / "vectors.arrow")[1]
    gram_II, _ = codec._read_matrix(Statistic.GRAM, folder / "gram.arrow", exponents["exponent"])
    read = time.perf_counter()
    assert torch.equal(gram_II.triu(), moments.gram_II.triu())
    return written - start, read - written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    rows = []
    for inputs in INPUTS:
        moments, matrix_bytes, case = made(inputs), inputs * inputs * 4, f"{inputs} inputs"
        with tempfile.TemporaryDirectory() as folder:
            seconds = [measured(moments, Path(folder)) for _ in range(repeats)]
            stored_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
        rows.append(records.record(case, "stored over full matrix", round(stored_bytes / matrix_bytes, 4), "ratio"))
        for figure, times in zip(("write", "read"), zip(*seconds, strict=True), strict=True):
            speeds = [matrix_bytes / each / 1e6 for each in times]
            spread = round(statistics.stdev(speeds)) if repeats > 1 else None
            rows.append(records.record(case, figure, round(statistics.median(speeds)), "MB/s", spread))
    for row in rows:
        print(f"{row['case']}, {row['figure']}: {row['value']} {row['unit']}")
    records.write("codec", rows, device=f"{platform.machine()} CPU, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
