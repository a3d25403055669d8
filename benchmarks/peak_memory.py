"""Claim: the peak memory of a calibration does not grow with the number of decoder blocks.

    python benchmarks/peak_memory.py [--blocks 8] [--repeats 3]

Random Llama models of B and 2B blocks are calibrated, each in its own process; the peak resident memory during the
calibration pass is compared with that just before it. The figure includes the moments of one block, as for a caller
that stores them block by block; windows and batches are the same for both models.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "peak_memory.json"
MIB = 2**20
WINDOWS, WINDOW_TOKENS, HIDDEN = 16, 128, 1024


def make(folder: Path, blocks: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(folder: Path) -> None:
    import psutil
    import torch

    from crosscal.models import ModelSource, walk

    source = ModelSource.open(folder)
    tokens_SL = torch.randint(0, 1024, (WINDOWS, WINDOW_TOKENS), generator=torch.Generator().manual_seed(0))
    process, done = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    walk(source, {"random": tokens_SL}, on_block=lambda found: None, batch_tokens=512)
    done.set()
    watcher.join()
    print(json.dumps({"peak_bytes": peak - start}))


def in_own_process(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def rows(blocks: int, repeats: int) -> list[dict[str, object]]:
    about = {"device": cpu_name(), "date": datetime.date.today().isoformat(), "commit": commit()}
    found: list[dict[str, object]] = []

    def add(case: str, value: float, unit: str, spread: float | None) -> None:
        found.append(
            {"case": case, "figure": "peak memory of a walk", "value": value, "unit": unit, "spread": spread, **about}
        )

    peaks: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (blocks, 2 * blocks):
            model = Path(folder, str(count))
            in_own_process("--make", str(model), "--blocks", str(count))
            weights = (model / "model.safetensors").stat().st_size / MIB
            runs = [json.loads(in_own_process("--measure", str(model)))["peak_bytes"] / MIB for _ in range(repeats)]
            peaks[count] = statistics.median(runs)
            add(
                f"{count} blocks, {weights:.0f} MiB of weights",
                round(peaks[count], 1),
                "MiB",
                round(max(runs) - min(runs), 1),
            )
    add(f"{2 * blocks} over {blocks} blocks", round(peaks[2 * blocks] / peaks[blocks], 3), "ratio", None)
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.blocks)
    elif options.measure:
        measure(options.measure)
    else:
        result = rows(options.blocks, options.repeats)
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        print("\n".join(f"{row['case']}: {row['value']} {row['unit']}" for row in result))


if __name__ == "__main__":
    main()
