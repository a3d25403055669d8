"""Solving takes the memory that the preflight predicts, for several numbers of variants and worker threads."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crosscal.models.source import ModelSource
from crosscal.stages.compress import compress_block
from crosscal.stages.preflight import block_shapes, solving_bytes
from crosscal.stages.sample import Sample
from crosscal.store import Store
from tests.helpers.processes import peak_bytes
from tests.helpers.tiny_run import collect, dense_cache, run_context, sample, variant, windows

HIDDEN, INNER, SHARDS = 512, 3072, 4
ALPHAS = (0.1, 0.3, 0.5, 0.9)


def sweep(count: int) -> list:
    mixtures = [{"general": 1 - alpha, "legal": alpha} for alpha in ALPHAS[:count]]
    return [variant(f"v{i}", "sparsegpt", m, sparsity=0.5, damping=0.01) for i, m in enumerate(mixtures)]


def calibrated(folder: Path, hidden: int, inner: int) -> Path:
    """Save a model of one block and two corpora of four shards each: 16 sets, calibration and held-out."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    source, store, samples = ModelSource.open(folder / "model"), Store(folder / "home"), []
    for number, name in enumerate(("general", "legal")):
        samples.append(sample(store, name, *(windows(4 + k, seed=10 * number + k) for k in range(SHARDS))))
        collect(dense_cache(store, source), source, samples[-1].sets)
    assert sum(len(each.sets) for each in samples) == 16
    (folder / "samples.json").write_text(json.dumps([each.as_json() for each in samples]))
    return folder


def solve(variants: int, folder: Path) -> None:
    samples = [Sample.from_json(each) for each in json.loads((folder / "samples.json").read_text())]
    source = ModelSource.open(folder / "model")
    with tempfile.TemporaryDirectory() as out:
        compress_block(run_context(Path(out), Store(folder / "home"), source, *samples), 0, sweep(variants))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small block, and one whose matrices are too large for the allocator to keep when freed."""
    folder = tmp_path_factory.mktemp("solving")
    return calibrated(folder / "small", 64, 128), calibrated(folder / "large", HIDDEN, INNER)


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "variants"), [(1, 1), (2, 4), (4, 4)])
def test_the_peak_of_a_solve_with_16_sets_is_what_the_preflight_says(
    folders: tuple[Path, Path], lanes: int, variants: int
) -> None:
    peak = peak_bytes(functools.partial(solve, variants), *folders, threads=lanes)
    source = ModelSource.open(folders[1] / "model")
    shapes = block_shapes(source, dense_cache(Store(folders[1] / "home"), source))
    said = solving_bytes(shapes, sweep(variants), lanes=lanes)
    assert peak == pytest.approx(said, rel=0.15)
    if lanes == 1:
        assert said < 16 * INNER**2 * 4, "the sets alone would take more"
