"""A calibration pass in lanes gives the same bits as in one lane: dense models, sequential walks, starved experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from crosscal.models import BlockMoments, ModelSource, walk
from crosscal.statistics.half_product import INPUTS_A_STRIP
from tests.helpers.tiny_models import save_model, windows


def bits(source: ModelSource, slices: Mapping[str, Tensor], threads: int, upstream: str) -> dict[str, bytes]:
    """Return every sum of every site as bytes, from a walk with `threads` torch threads."""
    found: dict[str, bytes] = {}

    def on_block(seen: BlockMoments) -> Mapping[str, Tensor] | None:
        for name, of_slice in seen.moments.items():
            for site, sums in of_slice.items():
                vectors = (sums.gram_II, sums.abs_sum_I, sums.sum_I, torch.tensor(sums.tokens))
                found[f"{seen.name} {name} {site}"] = b"".join(part.numpy().tobytes() for part in vectors)
        if upstream == "dense":
            return None
        return {name: value * 0.5 for name, value in seen.parameters.items() if value.ndim == 2}

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        walk(source, slices, on_block=on_block, upstream=upstream, dtype=torch.float32, batch_tokens=12)
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("upstream", ["dense", "sequential"])
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "mixtral"])
def test_lanes_change_no_bit(tmp_path: Path, family: str, upstream: str) -> None:
    source = ModelSource.open(save_model(family, tmp_path / "model"))
    slices = {"one": windows(9, length=6), "two": windows(2, length=12)}
    one = bits(source, slices, 1, upstream)
    assert one
    for threads in (2, 3, 8, 16):
        assert bits(source, slices, threads, upstream) == one


def test_a_single_batch_and_sums_in_strips_have_the_same_bits_on_any_number_of_threads(tmp_path: Path) -> None:
    """The model is wide enough for torch to parallelise single operations, and for a triangle in strips."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=2 * INPUTS_A_STRIP,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    source = ModelSource.open(tmp_path / "model")
    windows_SL = torch.randint(300, (24, 12), generator=torch.Generator().manual_seed(1))
    for slices in ({"one": windows_SL.view(-1)[None, :64]}, {"many": windows_SL}):
        one = bits(source, slices, 1, "dense")
        for threads in (2, 8, 16):
            assert bits(source, slices, threads, "dense") == one
