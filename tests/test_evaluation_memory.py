"""The memory of an evaluation matches the preflight estimate, also for a large vocabulary."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crosscal.evaluation import perplexity
from crosscal.evaluation.logits import LOGITS_BYTES
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource
from crosscal.progress import silent
from crosscal.stages.by_blocks import evaluating_by_blocks_bytes, texts_read
from crosscal.stages.heldout_text import HeldOutText
from crosscal.stages.moments import DENSE, CachedMoments
from crosscal.stages.preflight import BlockShape, EvaluationSizes, block_shapes, evaluating_bytes
from crosscal.store import Store
from tests.helpers.processes import peak_bytes

VOCABULARY, HIDDEN = 65536, 256


def measure(length: int, batch_tokens: int, by_blocks: bool, folder: Path) -> None:
    windows_SL = torch.randint(400, (max(2, batch_tokens // length), length))
    numbers = {"device": "cpu", "batch_tokens": batch_tokens}
    if by_blocks:
        text = HeldOutText("text", "test", windows_SL)
        with texts_read(folder, [text], dtype=torch.float32, name="model", report=silent, **numbers) as model:
            perplexity(model, windows_SL, name="text", split="test", **numbers)
    else:
        perplexity(load_variant(folder), windows_SL, name="text", split="test", **numbers)


def model(folder: Path, vocabulary: int, *, blocks: int = 2) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def shapes_and_sizes(folder: Path, vocabulary: int, tokens: int) -> tuple[list[BlockShape], EvaluationSizes]:
    source = ModelSource.open(folder)
    shapes = block_shapes(source, CachedMoments(Store(folder.parent / "home"), source.digest, DENSE, "float32"))
    return shapes, EvaluationSizes(source.parameters, HIDDEN, vocabulary, tokens, itemsize=4)


@pytest.mark.parametrize(("length", "batch_tokens"), [(1024, 4096), (256, 256)])
def test_the_peak_of_an_evaluation_is_what_the_preflight_says(tmp_path: Path, length: int, batch_tokens: int) -> None:
    small, large = model(tmp_path / "small", 512), model(tmp_path / "large", VOCABULARY)
    shapes, sizes = shapes_and_sizes(large, VOCABULARY, batch_tokens)
    said = evaluating_bytes(shapes, sizes)
    assert peak_bytes(partial(measure, length, batch_tokens, False), small, large) == pytest.approx(said, rel=0.15)
    assert said > min(batch_tokens * VOCABULARY * 8, LOGITS_BYTES)
    assert said < 4096 * VOCABULARY * 4, "the logits alone of 4096 tokens would take more"


@pytest.mark.parametrize(("vocabulary", "blocks"), [(VOCABULARY, 2), (512, 32)])
def test_block_by_block_it_takes_hardly_more_than_the_preflight_says(
    tmp_path: Path, vocabulary: int, blocks: int
) -> None:
    small, large = model(tmp_path / "small", 512), model(tmp_path / "large", vocabulary, blocks=blocks)
    shapes, sizes = shapes_and_sizes(large, vocabulary, 1024)
    said = evaluating_by_blocks_bytes(shapes, sizes, all_tokens=1024, free_bytes=2**34)
    assert peak_bytes(partial(measure, 256, 1024, True), small, large) < 1.15 * said
    if blocks > 2:
        assert said < 0.5 * evaluating_bytes(shapes, sizes)
