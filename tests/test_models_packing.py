"""Plain transformers loads packed checkpoints of every family, with everything packed that can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from crosscal.errors import ModelError
from crosscal.models import ModelSource, VariantWriter, load_variant, quantization_config
from crosscal.models.packing import FUSED, INITIALISED, TRANSPOSED
from tests.helpers import tiny_packed
from tests.helpers.tiny_models import FAMILIES, save_model, windows
from tests.test_models_names import BITS, matrices, rounded, stored, write

DENSE_ALL = {"falcon-parallel", "falcon-new", "falcon-alibi", "gpt2", "rwkv", "recurrent-gemma"}
"""Families of which nothing can be packed."""


def save(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    return (tiny_packed.save if family in tiny_packed.configs() else save_model)(family, folder, dtype=dtype)


@pytest.mark.parametrize("family", [*FAMILIES, *tiny_packed.configs()])
def test_plain_transformers_loads_what_is_written(family: str, tmp_path: Path) -> None:
    """Loaded as any user would: no key is missing, and the logits are those of the intended weights."""
    source = ModelSource.open(save(family, tmp_path / "model"))
    expected = write(source, tmp_path / "variant", is_packed=True)
    config = json.loads((tmp_path / "variant" / "config.json").read_text())
    has_packed = any(key.endswith(".weight_packed") for key in stored(tmp_path / "variant"))
    assert has_packed == (family not in DENSE_ALL) == ("quantization_config" in config)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    ours = load_variant(tmp_path / "variant")
    state = ours.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in expected.items() if name in state)
    with torch.no_grad():
        assert torch.equal(plain.eval()(windows(2)).logits, ours(windows(2)).logits)


@pytest.mark.parametrize(
    ("family", "reason", "linears"),
    [
        ("gpt2", TRANSPOSED, {"c_attn", "c_proj", "c_fc"}),
        ("gpt-oss", FUSED, {"gate_up_proj", "down_proj"}),
        ("gpt-bigcode", INITIALISED, {"c_proj"}),
        ("nanochat", INITIALISED, {"o_proj"}),
        ("mamba2", INITIALISED, {"out_proj"}),
        ("qwen3-moe", "", set()),
        ("laguna", "", set()),
    ],
)
def test_what_cannot_be_packed_is_known_before_anything_is_solved(
    family: str, reason: str, linears: set[str], tmp_path: Path
) -> None:
    source = ModelSource.open(save(family, tmp_path / "model"))
    parameters = {f"{source.block_name(block)}.{matrix.parameter}" for block, matrix in matrices(source)}
    why = {name: source.packing.why_dense(name) for name in parameters}
    assert set(why.values()) - {""} <= {reason}
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in parameters if why[name]} == linears


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "deepseek-v3", "qwen2-moe", "laguna"])
def test_experts_are_packed_one_by_one_in_the_hubs_names(family: str, tmp_path: Path) -> None:
    source = ModelSource.open(save(family, tmp_path / "model"))
    expected = write(source, tmp_path / "variant", is_packed=True)
    for block in range(source.blocks):
        read = VariantWriter(tmp_path / "variant", source).read_block(block, bits=BITS)
        assert all(torch.equal(expected[f"{source.block_name(block)}.{name}"], tensor) for name, tensor in read.items())
    before, after = stored(source.path), stored(tmp_path / "variant")
    experts = {key for key in before if ".experts." in key and key.endswith(".weight")}
    assert experts
    for key in experts:
        linear = key.removesuffix(".weight")
        assert after[f"{linear}.weight_shape"].tolist() == list(before[key].shape)
    ignored = set(json.loads((tmp_path / "variant" / "config.json").read_text())["quantization_config"]["ignore"])
    packed = {key.removesuffix(".weight_packed") for key in after if key.endswith(".weight_packed")}
    routers = {key.removesuffix(".weight") for key in before if key.endswith("gate.weight")}
    assert routers <= ignored  # engines that build routers as linears would take them for packed
    assert not packed & ignored


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_a_block_without_packed_linears_beside_packed_ones(family: str, tmp_path: Path) -> None:
    """Its experts are written as a stack; transformers would expect packed ones if they were stored one by one."""
    source = ModelSource.open(save(family, tmp_path / "model"))
    writer = VariantWriter(tmp_path / "variant", source)
    writer.write_block(0, {})
    for block in range(1, source.blocks):
        writer.write_block(block, {}, packed=rounded(source, block)[0])
    writer.finish(quantization_config(BITS, None, []))
    state, dense = load_variant(tmp_path / "variant").state_dict(), source.load_block(0)
    assert all(torch.equal(state[f"{source.block_name(0)}.{name}"], tensor) for name, tensor in dense.items())
    assert all(torch.equal(writer.read_block(0)[name], tensor) for name, tensor in dense.items())


def test_a_hub_checkpoint_with_stacked_experts_is_packed_as_well(tmp_path: Path) -> None:
    """Some families publish stacked experts, although transformers can also read them one by one."""
    source = ModelSource.open(save("qwen3-moe", tmp_path / "model"))
    tensors = source.weights.load(lambda name: True)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    stacked = ModelSource.open(tmp_path / "model")
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "model" / "model.safetensors"))
    expected = write(stacked, tmp_path / "variant", is_packed=True)
    state = load_variant(tmp_path / "variant").state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    assert all(not key.endswith("experts.gate_up_proj") for key in stored(tmp_path / "variant"))
    write(stacked, tmp_path / "dense", is_packed=False)
    assert stored(tmp_path / "dense").keys() == tensors.keys()


@pytest.mark.parametrize("family", ["gpt-bigcode", "nanochat", "mamba2", "recurrent-gemma"])
def test_packing_what_must_stay_dense_fails_to_load(family: str, tmp_path: Path) -> None:
    """What is left dense must stay dense: packed, transformers fails to load it, and `load_variant` reports that."""
    source = ModelSource.open(save(family, tmp_path / "model"))
    source.packing._initialised = set()
    write(source, tmp_path / "variant", is_packed=True)
    with pytest.raises(ModelError, match=r"cannot be loaded by transformers .*AttributeError"):
        load_variant(tmp_path / "variant")
