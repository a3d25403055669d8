"""Claim: time, memory and disk grow as theory predicts, and one more variant costs a small part of a calibration.

    python benchmarks/scaling.py [--repeats 3] [--threads 2]

One axis at a time on random Llama models, everything else as in BASE: tokens, width, blocks, variants of a sweep,
corpora. A measurement is one process that runs the calibration passes of all corpora and solves the sweep, into an
empty store. The figures are fitted by least squares in log-log as value = c · axis^e; the exponent is reported with the
theoretical one of the fastest growing term. Peak memory is the increase over the process's size at the start.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import cpu_model, load_average, median_record, record, write

MIB = 2**20
LENGTH = 256
SPARSITIES = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65]


@dataclass(frozen=True)
class Setting:
    tokens: int = 16384
    """Tokens per corpus."""
    hidden: int = 256
    blocks: int = 4
    variants: int = 1
    corpora: int = 1


BASE = Setting()
AXES = {
    "tokens": [8192, 16384, 32768, 65536],
    "hidden": [256, 384, 512, 768],
    "blocks": [2, 4, 8, 16],
    "variants": [1, 2, 4, 8],
    "corpora": [1, 2, 4],
}
FIGURES = {
    "moments": "s",
    "solve": "s",
    "peak memory": "MiB",
    "store": "MiB",
    "models": "MiB",
}
SAID = {
    "tokens": {"moments": "1", "solve": "0", "peak memory": "1 (hidden states)", "store": "0", "models": "0"},
    "hidden": {"moments": "2", "solve": "3", "peak memory": "1 to 2", "store": "2", "models": "2"},
    "blocks": {"moments": "1", "solve": "1", "peak memory": "0", "store": "1", "models": "1"},
    "variants": {"moments": "0", "solve": "below 1", "peak memory": "below 1", "store": "0", "models": "1"},
    "corpora": {"moments": "1", "solve": "below 1", "peak memory": "below 1", "store": "1", "models": "0"},
}
"""Theoretical exponents; "below 1" where a fixed part (loading and factoring) is shared along the axis."""


def make_model(folder: Path, setting: Setting) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Peak:
    """Context manager that measures this process's peak resident memory above that at the start."""

    def __enter__(self) -> Peak:
        import psutil

        self._process, self._done = psutil.Process(), threading.Event()
        self._start = self._highest = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.mib = (self._highest - self._start) / MIB


def measure(setting: Setting, threads: int) -> dict[str, float]:
    """Run and measure one job in this process."""
    import torch
    from job import bytes_below
    from run_crosscal import sample, ticket_of

    from crosscal.flows.pipeline import read_model, solve_blocks
    from crosscal.store import Store
    from crosscal.tasks.model import publish_models

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", setting)
        store, names = Store(folder / "store"), ["general", "one", "two", "three"][: setting.corpora]
        windows = torch.randint(1024, (len(names), 1 + setting.tokens // LENGTH, LENGTH))
        drawn = [
            sample(store, corpus, part_SL[1:], part_SL[:1]) for corpus, part_SL in zip(names, windows, strict=True)
        ]
        mixture = {corpus: 1 / len(names) for corpus in names}
        sweep = {"method": "sparsegpt", "sparsity": SPARSITIES[: setting.variants], "mixture": mixture}
        spec = ticket_of(str(folder / "model"), names, [sweep], drawn, folder)
        with Peak() as peak:
            started = time.perf_counter()
            list(read_model(None, spec))
            read = time.perf_counter()
            solve_blocks(None, spec)
            solved = time.perf_counter()
        publish_models.fn(spec)
        return {
            "moments": read - started,
            "solve": solved - read,
            "peak memory": peak.mib,
            "store": bytes_below(folder / "store") / MIB,
            "models": bytes_below(folder / "run" / "models") / MIB,
        }


def exponent(points: list[tuple[float, float]]) -> float:
    """Return the slope of log value over log axis by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    slope_up = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return slope_up / sum((x - mean_x) ** 2 for x, _ in logs)


def grid(repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    known: dict[Setting, list[dict[str, float]]] = {}
    for axis, values in AXES.items():
        settings = {value: dataclasses.replace(BASE, **{axis: value}) for value in values}
        for _ in range(repeats):
            for setting in settings.values():
                if len(known.setdefault(setting, [])) < repeats:
                    known[setting].append(in_own_process(setting, threads))
        for figure, unit in FIGURES.items():
            rows = [
                median_record(f"{axis} {value}", figure, [found[figure] for found in known[setting]], unit)
                for value, setting in settings.items()
            ]
            yield from rows
            slope = exponent([(value, row["value"]) for value, row in zip(values, rows, strict=True)])
            yield record(f"{axis}, exponent; mathematics: {SAID[axis][figure]}", figure, slope, "exponent")
            print(f"{axis}: {figure} grows with exponent {slope:.2f}; mathematics: {SAID[axis][figure]}", flush=True)


def in_own_process(setting: Setting, threads: int) -> dict[str, float]:
    one = json.dumps(dataclasses.asdict(setting))
    command = [sys.executable, __file__, "--threads", str(threads), "--one", one]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Setting(**json.loads(options.one)), options.threads)))
        return
    before = record("circumstances", "load average before", load_average(), "processes")
    rows = [before, *grid(options.repeats, options.threads)]
    rows.append(record("circumstances", "load average after", load_average(), "processes"))
    write("scaling", rows, device=f"{cpu_model()}, {options.threads} thread(s)")


if __name__ == "__main__":
    main()
