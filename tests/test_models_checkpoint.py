"""A variant that is written reads back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from crosscal.errors import ModelError, NotFinite
from crosscal.models import MatrixRef, ModelSource, VariantWriter, load_variant, replaced_parameters
from tests.helpers.tiny_models import FAMILIES, load_plain, save_model, windows


def write_unchanged(source: ModelSource, folder: Path) -> VariantWriter:
    writer = VariantWriter(folder, source)
    for block in reversed(range(source.blocks)):
        writer.write_block(block, {})
    writer.finish()
    return writer


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unchanged_variant_is_the_model(family: str, tmp_path: Path) -> None:
    model = save_model(family, tmp_path / "model", dtype=torch.bfloat16)
    write_unchanged(ModelSource.open(model), tmp_path / "variant")
    expected, got = load_plain(model, torch.bfloat16).state_dict(), load_variant(tmp_path / "variant").state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) and got[name].dtype == expected[name].dtype for name in expected)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "qwen3-moe"])
def test_changed_weights_are_loaded_and_the_others_kept(family: str, tmp_path: Path) -> None:
    model = save_model(family, tmp_path / "model", dtype=torch.bfloat16)
    source = ModelSource.open(model)
    writer = VariantWriter(tmp_path / "variant", source)
    parameters = source.load_block(0, dtype=torch.float32)
    name = next(name for name in parameters if "down_proj" in name or "c_fc.weight" in name)
    matrix = MatrixRef(name, name, 2 if parameters[name].ndim == 3 else None)
    weight_OI = matrix.weight_OI(parameters)
    changed = replaced_parameters(parameters, {matrix: weight_OI * (weight_OI > 0)})
    for block in range(source.blocks):
        writer.write_block(block, changed if block == 0 else {})
    writer.finish()
    expected, got = load_plain(model, torch.bfloat16).state_dict(), load_variant(tmp_path / "variant").state_dict()
    expected[f"{source.block_name(0)}.{name}"] = changed[name].bfloat16()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    read = writer.read_block(0)
    assert read.keys() == parameters.keys()
    assert all(torch.equal(read[key], changed.get(key, parameters[key]).bfloat16()) for key in read)


def test_a_variant_appears_when_its_index_does(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    writer = VariantWriter(tmp_path / "variant", source)
    writer.write_block(0, {})
    with pytest.raises(ModelError, match=r"not written yet \(got \[1, 2\]\)"):
        writer.finish()
    with pytest.raises(ModelError, match="not a complete model"):
        load_variant(tmp_path / "variant")
    resumed = VariantWriter(tmp_path / "variant", source)
    assert [resumed.has_block(block) for block in range(3)] == [True, False, False]


def test_a_failed_write_leaves_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    writer = VariantWriter(tmp_path / "variant", source)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        writer.write_block(0, {})
    assert not writer.has_block(0)


@pytest.mark.parametrize("value", [torch.nan, 1e39])
def test_numbers_that_are_not_finite_as_stored_are_refused(value: float, tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model", dtype=torch.bfloat16))
    writer = VariantWriter(tmp_path / "variant", source)
    bad = torch.full((32, 32), value, dtype=torch.float64)
    with pytest.raises(NotFinite, match=r"^model\.layers\.1\.self_attn\.q_proj\.weight:"):
        writer.write_block(1, {"self_attn.q_proj.weight": bad})
    assert not writer.has_block(1)


@pytest.mark.parametrize(("name", "rows"), [("self_attn.q_proj.weight", 31), ("self_attn.r_proj.weight", 32)])
def test_a_tensor_that_is_not_the_blocks_is_refused(name: str, rows: int, tmp_path: Path) -> None:
    writer = VariantWriter(tmp_path / "variant", ModelSource.open(save_model("llama", tmp_path / "model")))
    with pytest.raises(ModelError, match="no tensor of this name and shape"):
        writer.write_block(0, {name: torch.ones(rows, 32)})


def test_a_lost_tensor_is_not_replaced_by_random_numbers(tmp_path: Path) -> None:
    write_unchanged(ModelSource.open(save_model("llama", tmp_path / "model")), tmp_path / "variant")
    shard, lost = tmp_path / "variant" / "block-00001.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(shard)
    del tensors[lost]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"not in the checkpoint \(got {lost}\)"):
        load_variant(tmp_path / "variant")


def test_a_damaged_variant_is_a_clear_error(tmp_path: Path) -> None:
    write_unchanged(ModelSource.open(save_model("llama", tmp_path / "model")), tmp_path / "variant")
    shard = tmp_path / "variant" / "block-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_variant(tmp_path / "variant")
    shard.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_variant(tmp_path / "variant")


def test_a_plain_reader_computes_the_same(tmp_path: Path) -> None:
    model = save_model("qwen3-moe", tmp_path / "model")
    write_unchanged(ModelSource.open(model), tmp_path / "variant")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", experts_implementation="eager")
    tokens_SL = windows(2)
    with torch.no_grad():
        assert torch.equal(plain(tokens_SL).logits, load_plain(model, torch.float32)(tokens_SL).logits)


def test_what_lies_outside_is_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosscal.models.checkpoint.SHARD_BYTES", 1000)
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    write_unchanged(source, tmp_path / "variant")
    assert len(list((tmp_path / "variant").glob("outside-*"))) == 3  # embeddings, head, norm
    weight_map = json.loads((tmp_path / "variant" / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == source.weights.files.keys()
