"""Checkpoints in fp8 and mxfp4 are read as transformers reads them, and written in 16 bits or packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from crosscal.errors import ModelError
from crosscal.models import ModelSource, load_variant
from tests.helpers.tiny_models import save_model, windows
from tests.test_models_names import stored, write

TILE = 16


def encode_fp8(folder: Path, tile: int = TILE) -> dict[str, Tensor]:
    """Store the matrices of the blocks in fp8, tile by tile; return the decoded tensors."""
    tensors = load_file(folder / "model.safetensors")
    meant = dict(tensors)
    for key, weight in list(tensors.items()):
        if ".layers." in key and key.endswith("_proj.weight"):
            rows, columns = (-(-size // tile) for size in weight.shape)
            scales = torch.rand(rows, columns) + 0.5
            wide = scales.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[: weight.shape[0], : weight.shape[1]]
            tensors[key] = (weight.float() / wide).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = scales
            meant[key] = (tensors[key].float() * wide).to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, {"quant_method": "fp8", "weight_block_size": [tile, tile], "activation_scheme": "dynamic"})
    return meant


def encode_mxfp4(folder: Path) -> None:
    """Store the experts of a GPT-OSS in mxfp4, with random numbers."""
    tensors, chance = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj")) and "experts" in key]:
        count, inputs, outputs = tensors.pop(key).shape
        blocks = torch.randint(0, 256, (count, outputs, inputs // 32, 16), generator=chance)
        scales = torch.randint(122, 126, (count, outputs, inputs // 32), generator=chance)
        tensors |= {f"{key}_blocks": blocks.to(torch.uint8), f"{key}_scales": scales.to(torch.uint8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})


def say(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(windows(2)).logits


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "mixtral", "deepseek-v3"])
def test_fp8_is_read_as_it_is_meant(family: str, tmp_path: Path) -> None:
    """Also where a tile is cut off by the edge of a matrix (rows of 20 and 24, tiles of 16)."""
    folder = save_model(family, tmp_path / "model", dtype=torch.bfloat16)
    meant = encode_fp8(folder)
    source = ModelSource.open(folder)
    assert source.dtype == torch.bfloat16
    assert "fp8" in (source.encoding or "")
    assert source.weights.files.keys() == meant.keys()
    read = source.weights.stored(list(meant))
    assert all(torch.equal(read[key], meant[key]) and read[key].dtype == meant[key].dtype for key in meant)
    dense = tmp_path / "dense"
    save_model(family, dense, dtype=torch.bfloat16)
    save_file(meant, dense / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_variant(folder)), logits(load_variant(dense)))


def test_fp8_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = save_model("qwen3-moe", tmp_path / "model", dtype=torch.bfloat16)
    encode_fp8(folder, tile=8)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), experts_implementation="eager"
    )
    ours = load_variant(folder)
    state = ours.state_dict()
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in theirs.state_dict().items())


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = save_model("gpt-oss-wide", tmp_path / "model", dtype=torch.bfloat16)
    encode_mxfp4(folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), experts_implementation="eager"
    )
    ours = load_variant(folder)
    state = ours.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    assert torch.equal(logits(theirs), logits(ours))


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("family", ["llama", "deepseek-v3", "gpt-oss-wide"])
def test_what_is_written_is_no_longer_encoded(family: str, is_packed: bool, tmp_path: Path) -> None:
    """Plain transformers loads it: all in the config's dtype, or packed, with a config that states it."""
    folder = save_model(family, tmp_path / "model", dtype=torch.bfloat16)
    encode_mxfp4(folder) if family == "gpt-oss-wide" else encode_fp8(folder)
    source = ModelSource.open(folder)
    expected = write(source, tmp_path / "variant", is_packed=is_packed)
    config = json.loads((tmp_path / "variant" / "config.json").read_text()).get("quantization_config")
    assert (config or {}).get("quant_method") == ("compressed-tensors" if is_packed else None)
    assert not [key for key, tensor in stored(tmp_path / "variant").items() if tensor.dtype.itemsize == 1]
    plain, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "variant"), load_variant(tmp_path / "variant")
    assert torch.equal(logits(plain), logits(ours))
    state = ours.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    if not is_packed:
        assert stored(tmp_path / "variant").keys() == source.weights.files.keys()


def test_eight_bits_without_scales_are_refused(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}.*8-bit"):
        ModelSource.open(folder).load_block(1)
