"""Opening a model, streaming its blocks, and the errors for wrong files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosscal.errors import CrosscalError, ModelError
from crosscal.models import ModelSource, walk
from crosscal.models.attaching import attached
from crosscal.models.walk import survey
from tests.helpers.tiny_models import FAMILIES, load_plain, save_model, windows


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_tensors_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    """Block by block and outside the blocks, bit for bit; also for experts that are stored one by one."""
    folder = save_model(family, tmp_path / "model", dtype=torch.bfloat16)
    source, plain = ModelSource.open(folder), load_plain(folder, torch.bfloat16).state_dict()
    seen = source.load_outside(dtype=torch.bfloat16)
    for block in range(source.blocks):
        tensors = source.load_block(block, dtype=torch.bfloat16)
        seen |= {f"{source.block_name(block)}.{name}": tensor for name, tensor in tensors.items()}
    assert all(torch.equal(tensor, plain[name]) and tensor.dtype == plain[name].dtype for name, tensor in seen.items())
    assert plain.keys() - seen.keys() <= {"lm_head.weight", "lm_head.bias", "embed_out.weight"}


def test_facts_of_a_source(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("gpt2", tmp_path / "model", dtype=torch.float16))
    assert (source.blocks, source.dtype, source.max_positions) == (3, torch.float16, 64)
    assert source.block_name(1) == "transformer.h.1"


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    one = ModelSource.open(save_model("llama", tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert ModelSource.open(tmp_path / "two").digest == one.digest
    assert ModelSource.open(save_model("llama", tmp_path / "three", seed=1)).digest != one.digest
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert ModelSource.open(tmp_path / "two").digest != one.digest


def test_memory_is_given_back(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    model = source.skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())
    block = model.model.layers[1]
    with attached(block, source.load_block(1)):
        assert not any(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_attached_tensors_nest(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    with attached(layer, {"weight": torch.zeros(2, 2)}):
        assert not layer.weight.any()
    assert torch.equal(layer.weight, before)
    with pytest.raises(ModelError, match="wieght"), attached(layer, {"wieght": torch.zeros(2, 2)}):
        pass


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(config))


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
DAMAGES = {
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "config cannot be read": lambda folder: (folder / "config.json").write_text("{"),
    "holds no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pickled weights are never read": only_pickled,
    "no model-2.safetensors": lose_shard,
    "index of the weight files": lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
    "weight file cannot be read": truncate,
    "already quantized": quantized,
    K_PROJ: lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(K_PROJ)),
    "stray.weight": lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({"model.layers.1.stray.weight": torch.ones(2)})
    ),
    "shape does not fit": lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({K_PROJ: torch.ones(2, 2)})
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_one_clear_error(message: str, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    DAMAGES[message](folder)
    with pytest.raises(ModelError, match=message):
        walk(ModelSource.open(folder), {"all": windows(1)}, on_block=lambda found: None)


def test_a_stray_head_is_left_alone(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({"value_head.weight": torch.ones(2)}))
    assert walk(ModelSource.open(folder), {"all": windows(1)}, on_block=lambda found: None).blocks == 3


def test_experts_that_do_not_fit_together_are_an_error(tmp_path: Path) -> None:
    folder = save_model("mixtral", tmp_path / "model")
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:4].contiguous()}))
    with pytest.raises(ModelError, match=r"gate_up_proj.*do not fit together"):
        ModelSource.open(folder).load_block(0)


@pytest.mark.parametrize("name", ["./nowhere", "no such thing", "/etc/hostname"])
def test_a_wrong_name_is_not_looked_up(name: str) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        ModelSource.open(name)


def test_a_hub_id_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CrosscalError, match="a model that the hub could give"):
        ModelSource.open("nobody/nothing-of-this-name")


def test_no_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        ModelSource.open(save_model("llama", tmp_path / "model")).tokenizer()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="not a causal language model"):
        _ = ModelSource.open(folder).blocks


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", "x", "Field 'hidden_size' expected int"),
        ("num_attention_heads", 0, "modulo by zero"),
        ("num_attention_heads", 7, "not a multiple of the number of attention heads"),
        ("hidden_act", "nothing", "nothing"),
        ("num_hidden_layers", -1, "one list of -1 decoder blocks"),
        ("vocab_size", None, "Field 'vocab_size' expected int"),
        ("rope_parameters", {"rope_type": "?"}, r"\?"),
        ("intermediate_size", 50, "does not fit the config"),
        ("model_type", "none", "none"),
    ],
)
def test_a_config_that_makes_no_model_is_an_error_of_ours(field: str, value: object, said: str, tmp_path: Path) -> None:
    file = save_model("llama", tmp_path / "model") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ModelError, match=said):
        survey(ModelSource.open(tmp_path / "model"))
