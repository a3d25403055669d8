"""Evaluation takes the memory that the preflight says, however large the vocabulary."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crosscal.evaluation.logits import LOGITS_BYTES
from crosscal.models.source import ModelSource
from crosscal.stages.moments import DENSE, Cached
from crosscal.stages.preflight import block_shapes, evaluating_bytes, parameters_of
from crosscal.store import Store

ROOT = Path(__file__).parents[1]
VOCABULARY, HIDDEN = 65536, 256
MEASURED = """
import json, sys, threading
from pathlib import Path
import psutil, torch
from crosscal.evaluation import perplexity
from crosscal.models.loading import load_variant

process, done = psutil.Process(), threading.Event()
small, large = (Path(name) for name in sys.argv[1:3])
length, batch_tokens = map(int, sys.argv[3:])

def measure(folder):
    model = load_variant(folder)
    windows_SL = torch.randint(400, (max(2, batch_tokens // length), length))
    perplexity(model, windows_SL, name="text", split="test", device="cpu", batch_tokens=batch_tokens)

measure(small)  # what the libraries take once
start = peak = process.memory_info().rss

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, process.memory_info().rss)

watcher = threading.Thread(target=watch)
watcher.start()
measure(large)
done.set()
watcher.join()
print(json.dumps(peak - start))
"""


def model(folder: Path, vocabulary: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("length", "batch_tokens"), [(1024, 4096), (256, 256)])
def test_the_peak_of_an_evaluation_is_what_the_preflight_says(tmp_path: Path, length: int, batch_tokens: int) -> None:
    small, large = model(tmp_path / "small", 512), model(tmp_path / "large", VOCABULARY)
    command = [sys.executable, "-c", MEASURED, str(small), str(large), str(length), str(batch_tokens)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    source = ModelSource.open(large)
    said = evaluating_bytes(
        block_shapes(source, Cached(Store(tmp_path / "home"), source.digest, DENSE, "float32")),
        parameters=parameters_of(source),
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        tokens=batch_tokens,
        itemsize=4,
    )
    assert json.loads(done.stdout) == pytest.approx(said, rel=0.15)
    assert said > min(batch_tokens * VOCABULARY * 8, LOGITS_BYTES)
    assert said < 4096 * VOCABULARY * 4, "the logits alone of 4096 tokens would take more"
