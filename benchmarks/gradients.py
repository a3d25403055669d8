"""What loss gradients in the pruning score gain, and what they cost: real text, a small real model, one draw.

    python benchmarks/gradients.py TESTBED [--home STORE]

TESTBED contains `corpora/{general,biomedical,legal}` and `models/llama-mix-8m`. Wanda, and GBLM with several gradient
weights, half general and half domain text (alpha .5), run by crosscal itself, on one thread. Rows: test perplexities;
seconds of one core for a calibration pass with all sums (Σ x xᵀ among them) over a set of windows, and for the
gradients over it; bytes of each in the store.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import median_record, record, write

from crosscal.calibration.sets import stored_windows
from crosscal.flows.pipeline import carry_out
from crosscal.models.source import ModelSource
from crosscal.plan import parse_plan
from crosscal.progress import silent
from crosscal.report.rows import ResultRow, read_rows
from crosscal.stages.gradients import CachedGradients, collect_gradients
from crosscal.stages.moments import DENSE, CachedMoments, collect_moments
from crosscal.store import Store, digest_of

DOMAINS = ("biomedical", "legal")
SPARSITIES = [0.5, 0.6]
WEIGHTS = [1, 5, 25, 100, 1000]
"""25 is the published value, for means."""
WINDOWS, LENGTH, HELD_OUT = 128, 256, 32
COST_WINDOWS, REPEATS = 32, 3


def plan_of(testbed: Path, compress: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": str(testbed / "models" / "llama-mix-8m"),
        "corpora": {name: str(testbed / "corpora" / name) for name in ("general", *DOMAINS)},
        "calibration": {"windows": WINDOWS, "length": LENGTH, "held_out_windows": HELD_OUT},
        "compress": [{**entry, "domain": list(DOMAINS), "alpha": 0.5} for entry in compress],
        "evaluate": {"windows": 48},
        "execution": {"device": "cpu", "keep_models": False},
    }


def run(testbed: Path, home: str, *compress: dict[str, Any]) -> dict[str, Any]:
    return carry_out(parse_plan(plan_of(testbed, compress)), home, f"{home}/runs/gradients")


def costs(testbed: Path) -> list[dict[str, Any]]:
    """Return CPU seconds and stored bytes; random tokens take as long as text."""
    source = ModelSource.open(testbed / "models" / "llama-mix-8m")
    seconds: dict[str, list[float]] = defaultdict(list)
    stored: dict[str, int] = {}
    for repeat in range(REPEATS):
        with tempfile.TemporaryDirectory() as home:
            store, tokens_SL = Store(home), random_tokens(source, repeat)
            stored_windows(store, {"repeat": repeat}, lambda tokens_SL=tokens_SL: tokens_SL)
            cached, sets = CachedMoments(store, source.digest, DENSE, "float32"), [digest_of({"repeat": repeat})]
            for kind, collect in (
                ("moments", partial(collect_moments, cached)),
                ("gradients", partial(collect_gradients, CachedGradients(cached))),
            ):
                started = time.process_time()
                collect(source, sets, device="cpu", batch_tokens=4096, report=silent)
                seconds[kind].append(time.process_time() - started)
                stored[kind] = sum(artifact.bytes for artifact in store.list(kind))
    ratios = [after / before for before, after in zip(seconds["moments"], seconds["gradients"], strict=True)]
    rows = [median_record(kind, f"{COST_WINDOWS} windows", spent, "s") for kind, spent in seconds.items()]
    rows += [record(kind, "stored, a set", taken / 1e6, "MB") for kind, taken in stored.items()]
    return [*rows, median_record("gradients", "time over that of the moments", ratios, "")]


def random_tokens(source: ModelSource, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(source.config.get_text_config().vocab_size, (COST_WINDOWS, LENGTH), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--home")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    testbed, home = arguments.testbed.resolve(), arguments.home or tempfile.mkdtemp(prefix="crosscal-gradients-")
    rows = costs(testbed)
    gblm = {"method": "gblm", "sparsity": SPARSITIES, "gradient_weight": WEIGHTS}
    done = run(testbed, home, {"method": "wanda", "sparsity": SPARSITIES}, gblm)
    for row in read_rows(Path(done["run_dir"]) / "results.jsonl", ResultRow):
        if row.value is None or row.split != "test" or (row.mixture and row.corpus_or_task not in row.mixture):
            continue
        weight = f" a={row.setting['gradient_weight']:g}" if row.method == "gblm" else ""
        level = f" {row.setting['sparsity']:.0%}" if row.mixture else ""
        on = f", {next(name for name in row.mixture if name != 'general')}" if row.mixture else ""
        rows.append(
            record(f"{row.method}{weight}{level}{on}", f"{row.corpus_or_task} perplexity", row.value, "", row.stderr)
        )
        print(rows[-1])
    write("gradients", rows)


if __name__ == "__main__":
    main()
