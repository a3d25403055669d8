"""What self-calibration costs: CPU seconds per thousand tokens that the model writes.

    python benchmarks/writing.py MODEL [--windows 16] [--length 512] [--before COMMIT] [--dry]

MODEL is a folder. `generate_windows` fills the windows in a fresh store on one thread, from the start token alone: at
this commit with its default batches and with batches of 8, and at `--before` (checked out in a worktree).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from records import load_average, record, write
from transformers import PreTrainedModel

from crosscal.calibration import WindowRequest, generate_windows
from crosscal.calibration.generation import BATCH
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource
from crosscal.store import Store

ROOT = Path(__file__).resolve().parents[1]


def written(options: argparse.Namespace, **settings: Any) -> dict[str, float]:
    """Return the number of sequences and tokens, and CPU seconds per thousand tokens."""
    torch.set_num_threads(1)
    model: PreTrainedModel = load_variant(options.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        store, request = Store(folder), WindowRequest(options.windows, options.length)
        given = (store, model, "0" * 64, ModelSource.open(options.model).tokenizer(), "1" * 64, request)
        cpu = time.process_time()
        generate_windows(*given, **settings)
        cpu = time.process_time() - cpu
        batches = [json.loads(store.read_bytes(one, "sequences.json")) for one in store.list("generations")]
    tokens = sum(len(row) for rows in batches for row in rows)
    sequences = sum(map(len, batches))
    return {"sequences": sequences, "tokens": tokens, "CPU s / 1000 tokens": 1000 * cpu / tokens}


def of_commit(commit: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure another commit, in a separate process."""
    with tempfile.TemporaryDirectory(prefix="crosscal-writing-") as folder:
        place = Path(folder, "before")
        subprocess.run(["git", "worktree", "add", "--detach", str(place), commit], cwd=ROOT, check=True)
        try:
            asked = [str(options.model.resolve()), "--windows", str(options.windows), "--length", str(options.length)]
            command = [sys.executable, str(Path(__file__).resolve()), *asked, "--only"]
            paths = {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT / "benchmarks")])}
            run = subprocess.run(command, cwd=place, env={**os.environ, **paths}, check=True, capture_output=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(place)], cwd=ROOT, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--before", help="a commit")
    parser.add_argument("--only", action="store_true", help="print this commit's figures and nothing else")
    parser.add_argument("--dry", action="store_true", help="to try the script: nothing is written")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(written(options)))
        return
    load, found = load_average(), {}
    if options.before:
        found[f"before ({options.before[:7]}), batches of 8"] = of_commit(options.before, options)
    found["now, batches of 8"] = written(options, batch=8)
    found[f"now, batches of {min(BATCH, options.windows)}"] = written(options)
    name = options.model.resolve().name
    rows = [record(f"{name}, {way}", figure, value, "") for way, one in found.items() for figure, value in one.items()]
    for row in rows:
        print(f"{row['case']:56} {row['figure']:22} {row['value']:10.2f}")
    if not options.dry:
        write("writing", [*rows, record("circumstances", "load average before", load, "processes")])


if __name__ == "__main__":
    main()
