"""A written folder is the source with other values: the same tensor names, whichever class loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from crosscal.compressors import COMPRESSORS, LayerProblem
from crosscal.models import (
    BlockMoments,
    Ints,
    MatrixRef,
    ModelSource,
    VariantWriter,
    load_variant,
    quantization_config,
    replaced_parameters,
    walk,
)
from tests.helpers.tiny_models import FAMILIES, save_model, windows
from tests.helpers.tiny_wrappers import CLASSES, WRAPPERS, save_wrapper

BITS = 4
PARTS = ("weight_packed", "weight_scale", "weight_shape")


def stored(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def add_extras(folder: Path, *blocks: str) -> dict[str, Tensor]:
    """Add tensors that the language model has no place for: a draft head, and layers beyond the last."""
    extras = {"mtp.fc.weight": torch.randn(4, 8), "mtp.layers.0.mlp.up_proj.weight": torch.randn(3, 5)}
    extras |= {f"{block}.mlp.up_proj.weight": torch.randn(48, 32) for block in blocks}
    file = folder / "model.safetensors"
    save_file(load_file(file) | extras, file, metadata={"format": "pt"})
    return extras


def matrices(source: ModelSource) -> list[tuple[int, MatrixRef]]:
    found: list[tuple[int, MatrixRef]] = []

    def on_block(seen: BlockMoments) -> None:
        found.extend((seen.block, matrix) for site in seen.sites for matrix in site.matrices)

    walk(source, {"all": windows(4)}, on_block=on_block)
    return found


def rounded(source: ModelSource, block: int) -> tuple[dict[MatrixRef, Ints], dict[MatrixRef, Tensor]]:
    """Return every matrix of a block that can be packed, at 4 bits: as integers and as decoded weights."""
    parameters, name = source.load_block(block), source.block_name(block)
    ints: dict[MatrixRef, Ints] = {}
    weights: dict[MatrixRef, Tensor] = {}
    for matrix in (matrix for number, matrix in matrices(source) if number == block):
        if not source.packing.why_dense(f"{name}.{matrix.parameter}"):
            weight_OI = matrix.weight_OI(parameters)
            problem = LayerProblem(
                matrix.name, weight_OI.float(), torch.eye(weight_OI.shape[1]), stored_dtype=weight_OI.dtype
            )
            solution = COMPRESSORS["rtn"](bits=BITS, group_size=None).compress(problem)
            assert solution.grid is not None
            ints[matrix] = Ints(solution.grid.ints_OI, solution.grid.scale_OG.to(weight_OI.dtype), BITS)
            weights[matrix] = solution.weight_OI.to(weight_OI.dtype)
    return ints, weights


def write(source: ModelSource, folder: Path, *, is_packed: bool) -> dict[str, Tensor]:
    """Write a variant with every matrix halved or quantized to 4 bits; return its weights by full name."""
    writer, weights, seen = VariantWriter(folder, source), dict[str, Tensor](), matrices(source)
    for block in range(source.blocks):
        parameters = source.load_block(block)
        ints, new = rounded(source, block) if is_packed else ({}, {})
        if not is_packed:
            new = {matrix: matrix.weight_OI(parameters) / 2 for number, matrix in seen if number == block}
        dense = replaced_parameters(parameters, new)
        weights |= {f"{source.block_name(block)}.{name}": value for name, value in (parameters | dense).items()}
        writer.write_block(block, {} if is_packed else dense, packed=ints)
    writer.finish(quantization_config(BITS, None, []) if is_packed else None)
    return weights


def assert_unchanged_but(solved: set[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for key in before.keys() - solved:
        assert before[key].dtype == after[key].dtype, key
        assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
def test_the_written_folder_has_the_sources_names(family: str, tmp_path: Path) -> None:
    save = save_wrapper if family in WRAPPERS else save_model
    folder = save(family, tmp_path / "model", dtype=torch.bfloat16)
    add_extras(folder)
    source, before = ModelSource.open(folder), stored(folder)
    write(source, tmp_path / "variant", is_packed=False)
    after = stored(tmp_path / "variant")
    assert after.keys() == before.keys()
    solved = {key for key in before if not torch.equal(before[key], after[key])}
    due = {f"{source.block_name(block)}.{matrix.parameter}" for block, matrix in matrices(source)}
    assert solved == source.weights.keys_of(lambda name: name in due)
    assert_unchanged_but(solved, before, after)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "variant")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-new", "bloom", "qwen3-moe", *WRAPPERS])
def test_packed_linears_alone_change_names(family: str, tmp_path: Path) -> None:
    save = save_wrapper if family in WRAPPERS else save_model
    folder = save(family, tmp_path / "model")
    add_extras(folder)
    source, before = ModelSource.open(folder), stored(folder)
    write(source, tmp_path / "variant", is_packed=True)
    after = stored(tmp_path / "variant")
    packed = {key.removesuffix("_packed") for key in after if key.endswith(".weight_packed")}
    parts = {f"{key.rpartition('.')[0]}.{part}" for key in packed for part in PARTS}
    assert packed <= before.keys()
    assert after.keys() == (before.keys() - packed) | parts
    assert_unchanged_but(packed, before, after)


def loads_completely(kind: Any, folder: Path) -> Any:
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[problem] for problem in ("missing_keys", "mismatched_keys")), report
    unexpected = {key for key in report["unexpected_keys"] if not key.startswith("mtp.")}
    assert unexpected == set()
    return model.eval()


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("family", WRAPPERS)
def test_a_wrapper_loads_as_its_own_class(family: str, is_packed: bool, tmp_path: Path) -> None:
    """The vision tower is unchanged, and the language model inside is the compressed one."""
    folder = save_wrapper(family, tmp_path / "model")
    source, tokens_SL = ModelSource.open(folder), windows(2)
    write(source, tmp_path / "variant", is_packed=is_packed)
    text = load_variant(tmp_path / "variant", dtype=torch.float32)
    whole = loads_completely(AutoModelForImageTextToText, tmp_path / "variant")
    before = loads_completely(AutoModelForImageTextToText, folder)
    assert type(whole).__name__ == type(before).__name__ == CLASSES[family]
    towers = [
        {name: value for name, value in model.state_dict().items() if "vis" in name.partition("layers")[0]}
        for model in (whole, before)
    ]
    assert towers[0].keys() == towers[1].keys() != set()
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])
    with torch.no_grad():
        logits = text(input_ids=tokens_SL).logits
        torch.testing.assert_close(whole(input_ids=tokens_SL).logits, logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before(input_ids=tokens_SL).logits, logits, rtol=1e-2, atol=1e-2)


def test_what_no_one_calibrates_is_copied_and_named(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    extras = add_extras(folder, "model.layers.3", "model.layers.4")
    source = ModelSource.open(folder)
    assert source.uncalibrated == ["model.layers.3 (1 tensor)", "model.layers.4 (1 tensor)", "mtp (2 tensors)"]
    write(source, tmp_path / "variant", is_packed=False)
    after = stored(tmp_path / "variant")
    assert all(torch.equal(after[key], extras[key]) for key in extras)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "variant").config.num_hidden_layers == 3


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_another_prefix_stays(family: str, tmp_path: Path) -> None:
    """Older checkpoints hold the base model alone, without the prefix that the causal model gives it."""
    folder = save_model(family, tmp_path / "model")
    file = folder / "model.safetensors"
    base = {key.removeprefix("transformer.").removeprefix("model."): value for key, value in load_file(file).items()}
    save_file(base, file, metadata={"format": "pt"})
    source, before = ModelSource.open(folder), stored(folder)
    for is_packed in (False, True):
        weights = write(source, tmp_path / f"variant-{is_packed}", is_packed=is_packed)
        names = {
            f"{key.rpartition('.')[0]}.weight" if key.rpartition(".")[2] in PARTS else key
            for key in stored(tmp_path / f"variant-{is_packed}")
        }
        assert names == before.keys()
        loaded = load_variant(tmp_path / f"variant-{is_packed}").state_dict()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_classes_of_wrappers_are_those_of_transformers() -> None:
    assert all(hasattr(transformers, name) for name in CLASSES.values())
