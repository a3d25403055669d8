"""The backward walk for gradients takes the memory that the preflight predicts, for one and two windows at once.

What the walk holds is measured, not what glibc keeps for reuse: the matrices of this model are so small that each
thread keeps its own, 80 to 150 MB with two windows, differently in every run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crosscal.models.source import ModelSource
from crosscal.progress import silent
from crosscal.stages.gradients import CachedGradients, collect_gradients
from crosscal.stages.preflight import block_shapes, walking_back_bytes
from crosscal.store import Store
from tests.helpers.tiny_run import LENGTH, collect, dense_cache, keep_windows, windows

ROOT = Path(__file__).parents[1]
HIDDEN, INNER, VOCABULARY, SETS, WINDOWS = 768, 3072, 4000, 2, 8
MEASURED = """
import ctypes, gc, json, sys, threading
from pathlib import Path
import psutil, torch
from crosscal.lanes import M_MMAP_THRESHOLD
from tests.test_stages_gradients_memory import walk_back

process, done = psutil.Process(), threading.Event()
torch.set_num_threads(int(sys.argv[3]))
walk_back(Path(sys.argv[1]))  # what the libraries take once
gc.collect()
glibc = ctypes.CDLL(None)
glibc.mallopt(M_MMAP_THRESHOLD, 2**16)  # tensors have pages of their own, which freeing returns
glibc.malloc_trim(0)
start = peak = process.memory_info().rss

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, process.memory_info().rss)

watcher = threading.Thread(target=watch)
watcher.start()
walk_back(Path(sys.argv[2]))
done.set()
watcher.join()
print(json.dumps(peak - start))
"""


def sets() -> list[torch.Tensor]:
    return [windows(WINDOWS, seed=seed) for seed in range(SETS)]


def walk_back(folder: Path) -> None:
    source, store = ModelSource.open(folder / "model"), Store(folder / "home")
    cached = CachedGradients(dense_cache(store, source))
    keys = [keep_windows(store, tokens_SL) for tokens_SL in sets()]
    done = collect_gradients(cached, source, keys, device="cpu", batch_tokens=512, report=silent)
    assert done.misses == 4 * source.blocks * SETS


def calibrated(folder: Path, hidden: int, inner: int) -> Path:
    """Save a model of three blocks and store its sites; return the folder."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    source, store = ModelSource.open(folder / "model"), Store(folder / "home")
    collect(dense_cache(store, source), source, [keep_windows(store, windows(1, seed=9))])
    return folder


@pytest.mark.parametrize("threads", [1, 2])
def test_the_peak_of_a_walk_back_is_what_the_preflight_says(tmp_path: Path, threads: int) -> None:
    small, large = calibrated(tmp_path / "small", 64, 128), calibrated(tmp_path / "large", HIDDEN, INNER)
    command = [sys.executable, "-c", MEASURED, str(small), str(large), str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    source = ModelSource.open(large / "model")
    shapes = block_shapes(source, dense_cache(Store(large / "home"), source))
    said = walking_back_bytes(
        shapes,
        outside=source.parameters - sum(shape.parameters for shape in shapes),
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        length=LENGTH,
        windows=threads,
        tokens=SETS * WINDOWS * LENGTH,
        sets=SETS,
        itemsize=4,
        free_bytes=2**40,
    )
    assert json.loads(done.stdout) == pytest.approx(said, rel=0.25)
