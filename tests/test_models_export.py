"""Packed linears: what is loaded is integer times scale, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from crosscal.errors import ModelError
from crosscal.models import (
    Ints,
    MatrixRef,
    ModelSource,
    VariantWriter,
    load_variant,
    packed_tensors,
    quantization_config,
)
from crosscal.models.export import unpacked_weight_OI
from tests.helpers.tiny_models import save_model, windows


def write_packed(source: ModelSource, folder: Path, bits: int, group_size: int | None) -> dict[str, Tensor]:
    """Write a variant with every 2-D projection of every block on a random grid; return its weights by full name."""
    generator, expected = torch.Generator().manual_seed(bits), {}
    writer = VariantWriter(folder, source)
    for block in range(source.blocks):
        packed: dict[MatrixRef, Ints] = {}
        for name, weight_OI in source.load_block(block).items():
            if not name.endswith("_proj.weight"):
                continue
            outputs, inputs = weight_OI.shape
            group = group_size or inputs
            ints_OI = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs), generator=generator)
            scale_OG = torch.rand(outputs, inputs // group, generator=generator).to(source.dtype)
            packed[MatrixRef(name.removesuffix(".weight"), name)] = Ints(ints_OI, scale_OG, bits)
            grid = ints_OI.view(outputs, -1, group) * scale_OG[..., None]
            expected[f"{source.block_name(block)}.{name}"] = grid.view(outputs, inputs).to(source.dtype)
        writer.write_block(block, {}, packed=packed)
        read = writer.read_block(block, bits=bits)
        prefix = f"{source.block_name(block)}."
        assert all(torch.equal(read[n.removeprefix(prefix)], w) for n, w in expected.items() if n.startswith(prefix))
    writer.finish(quantization_config(bits, group_size, []))
    return expected


@pytest.mark.parametrize(
    ("family", "bits", "group_size"),
    [
        ("llama", 4, 16),
        ("llama", 3, 8),
        ("llama", 2, 16),
        ("llama", 8, 16),
        ("llama", 4, None),
        ("mixtral", 4, 8),
        ("qwen3-moe", 3, None),
    ],
)
def test_packed_weights_are_integer_times_scale(family: str, bits: int, group_size: int | None, tmp_path: Path) -> None:
    source = ModelSource.open(save_model(family, tmp_path / "model", dtype=torch.bfloat16))
    expected = write_packed(source, tmp_path / "variant", bits, group_size)
    dense = load_variant(tmp_path / "variant")
    weights = dense.state_dict()
    assert expected
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    untouched = source.load_outside() | {
        f"{source.block_name(0)}.{name}": tensor for name, tensor in source.load_block(0).items()
    }
    assert all(torch.equal(weights[name], tensor) for name, tensor in untouched.items() if name not in expected)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "variant")  # as any reader would
    with torch.no_grad():
        assert torch.equal(packed(windows(1)).logits, dense(windows(1)).logits)


@pytest.mark.parametrize(("group_size", "hidden"), [(32, 64), (64, 64)])
def test_groups_of_usual_size(group_size: int, hidden: int) -> None:
    ints_OI = torch.randint(-8, 8, (5, 2 * hidden))
    scale_OG = torch.rand(5, 2 * hidden // group_size)
    tensors = packed_tensors("x", ints_OI, scale_OG, 4)
    weight_OI = unpacked_weight_OI(tensors["x.weight_packed"], tensors["x.weight_scale"], tensors["x.weight_shape"], 4)
    assert torch.equal(weight_OI, ints_OI * scale_OG.repeat_interleave(group_size, 1))
    assert tensors["x.weight_packed"].shape == (5, 2 * hidden * 4 // 32)


def test_what_stays_dense_is_on_the_ignore_list(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    write_packed(source, tmp_path / "variant", 4, 16)
    config = json.loads((tmp_path / "variant" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["weights"]["symmetric"] is True


def test_integers_outside_the_grid_are_refused() -> None:
    with pytest.raises(ModelError, match=r"3 bits lie between -4 and 3 \(got -1 to 4\)"):
        packed_tensors("x", torch.tensor([[-1, 4]]), torch.ones(1, 1), 3)
