"""Every matrix of every block has a row in a run's layer results, solved or left dense."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForCausalLM

from crosscal.errors import PlanError, UnsupportedModel
from crosscal.models import ModelSource
from crosscal.models.blocks import find_blocks
from crosscal.models.experts import is_experts
from crosscal.stages.compress import RunContext, compress_block, layer_rows
from crosscal.stages.left_dense import left_dense
from crosscal.store import Store
from crosscal.variants import RecipeStep, Variant
from tests.helpers.tiny_models import save_model
from tests.helpers.tiny_run import collect, dense_cache, run_context, sample, variant, windows


def test_what_stays_dense_is_a_row_with_the_reason(tmp_path: Path) -> None:
    source, store = ModelSource.open(save_model("qwen2-moe", tmp_path / "model")), Store(tmp_path / "home")
    context = run_context(tmp_path / "run", store, source, sample(store, "general", windows(200, seed=1, high=96)))
    variants = [
        variant("half", "wanda", {"general": 1.0}, sparsity=0.5),
        variant("small", "magnitude", None, sparsity=0.3),
    ]
    foretold = left_dense(source, context.cached)
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    for block in range(source.blocks):
        compress_block(context, block, variants)
    assert left_dense(source, context.cached) == foretold  # independent of stored moments
    assert foretold == [
        "mlp.gate: a router: it only chooses what others read (3 blocks)",
        "mlp.shared_expert_gate: a gate of one output (3 blocks)",
    ]
    rows = layer_rows(context, variants)
    for each in variants:
        mine = {row.layer: row for row in rows if row.variant == each.name}
        assert mine.keys() == set(matrices(source))
        left = {name: row.fallback for name, row in mine.items() if row.fallback}
        assert left == {
            f"model.layers.{block}.mlp.{name}": f"left dense: {reason}"
            for block in range(3)
            for name, reason in (
                ("gate", "a router: it only chooses what others read"),
                ("shared_expert_gate", "a gate of one output"),
            )
        }
        assert all(mine[name].sparsity == 0 and mine[name].bits is None for name in left)


def matrices(source: ModelSource) -> list[str]:
    """Return the names of all matrices of all blocks, found by their shapes alone."""
    found = []
    for index, block in enumerate(find_blocks(source.weights.model)[1]):
        for name, module in block.named_modules():
            for parameter, tensor in module.named_parameters(recurse=False):
                experts = range(tensor.shape[0]) if is_experts(module) else [None]
                parts = [name if expert is None else f"{name}.{expert}.{parameter}" for expert in experts]
                found += [f"{source.block_name(index)}.{part}" for part in parts if tensor.ndim > 1]
    return found


LEFT = ("*.mlp.gate_proj", "model.layers.1.*")


def solved(source: ModelSource, store: Store, folder: Path, *variants: Variant) -> RunContext:
    context = run_context(folder, store, source, sample(store, "general", windows(40, seed=1, high=96)))
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    for block in range(source.blocks):
        compress_block(context, block, variants)
    return context


@pytest.mark.parametrize("method", [{"sparsity": 0.5}, {"bits": 4, "group_size": None}], ids=["sparse", "quantized"])
def test_what_a_plan_names_stays_and_nothing_else_changes(method: dict[str, Any], tmp_path: Path) -> None:
    source, store = ModelSource.open(save_model("llama", tmp_path / "model")), Store(tmp_path / "home")
    whole = variant("whole", "sparsegpt" if "sparsity" in method else "gptq", {"general": 1.0}, **method)
    part = dataclasses.replace(whole, name="part", leave_dense=LEFT)
    assert part.key != whole.key
    context = solved(source, store, tmp_path / "run", whole, part)
    rows = {name: {row.layer: row for row in layer_rows(context, [each])} for name, each in (("w", whole), ("p", part))}
    assert rows["w"].keys() == rows["p"].keys()
    named = {layer for layer in rows["p"] if any(fnmatch(layer, pattern) for pattern in LEFT)}
    assert {layer for layer, row in rows["p"].items() if row.fallback} == named
    assert len(named) == 2 + 7  # gate_proj of two blocks, all seven of the second
    bits = method.get("bits")
    for block in range(source.blocks):
        before = source.load_block(block)
        after = {each: context.writer(each).read_block(block, bits=bits) for each in (whole, part)}
        for name in before:
            is_named = f"{source.block_name(block)}.{name.removesuffix('.weight')}" in named
            assert torch.equal(after[part][name], before[name] if is_named else after[whole][name]), name
    for layer in rows["p"].keys() - named:
        assert dataclasses.replace(rows["p"][layer], variant="", seconds=0.0) == dataclasses.replace(
            rows["w"][layer], variant="", seconds=0.0
        )
    assert all("named in `leave_dense`" in (rows["p"][layer].fallback or "") for layer in named)
    assert "mlp.gate_proj: named in `leave_dense` (3 blocks)" in left_dense(source, context.cached, LEFT)


def test_a_norm_is_not_divided_while_something_that_reads_it_stays_dense(tmp_path: Path) -> None:
    file = save_model("llama", tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    for name in (name for name in tensors if name.endswith("post_attention_layernorm.weight")):
        tensors[name][:4] *= 30  # inputs large enough for AWQ to scale
    save_file(tensors, file, metadata={"format": "pt"})
    source, store = ModelSource.open(tmp_path / "model"), Store(tmp_path / "home")
    steps = (
        RecipeStep("awq", (("bits", 4), ("group_size", None))),
        RecipeStep("gptq", (("bits", 4), ("group_size", None))),
    )
    scaled = dataclasses.replace(variant("awq", "gptq", {"general": 1.0}, bits=4, group_size=None), recipe=steps)
    part = dataclasses.replace(scaled, name="part", leave_dense=("*.mlp.gate_proj",))
    context = solved(source, store, tmp_path / "run", scaled, part)
    norm = "post_attention_layernorm.weight"
    for block in range(source.blocks):
        before = source.load_block(block)[norm]
        assert not torch.equal(context.writer(scaled).read_block(block, bits=4)[norm], before)
        assert torch.equal(context.writer(part).read_block(block, bits=4)[norm], before)
    folds = {row.layer: row.fold for row in layer_rows(context, [part])}
    assert folds["model.layers.0.mlp.up_proj"] == "none: a matrix that reads it stays dense"


def test_a_pattern_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    cached = dense_cache(Store(tmp_path / "home"), source)
    with pytest.raises(PlanError, match=r"leave_dense: no matrix of a block has such a name \(got \*\.down\)"):
        left_dense(source, cached, ["*.down_proj", "*.down"])


def test_what_cannot_be_calibrated_is_refused_or_left_if_it_is_named(tmp_path: Path) -> None:
    """The remedy in the message works; `left_dense` and a solve raise the same error."""
    config = BartConfig(
        vocab_size=96, d_model=32, decoder_layers=2, decoder_ffn_dim=48, decoder_attention_heads=4, is_decoder=True,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    BartForCausalLM(config).save_pretrained(tmp_path / "model")
    source, store = ModelSource.open(tmp_path / "model"), Store(tmp_path / "home")
    half = variant("half", "wanda", {"general": 1.0}, sparsity=0.5)
    with pytest.raises(UnsupportedModel, match=r"encoder_attn\.k_proj: this matrix never receives") as checked:
        left_dense(source, dense_cache(store, source))
    with pytest.raises(UnsupportedModel) as run:
        solved(source, store, tmp_path / "refused", half)
    assert (run.value.what, run.value.where, run.value.do) == (
        checked.value.what, checked.value.where, checked.value.do
    )  # fmt: skip
    patterns = yaml.safe_load(checked.value.do.split("`")[1])["leave_dense"]
    left_dense(source, dense_cache(store, source), patterns)
    part = dataclasses.replace(half, leave_dense=tuple(patterns))
    context = solved(source, store, tmp_path / "run", part)
    dense = [row for row in layer_rows(context, [part]) if row.fallback]
    assert len(dense) == 2 * 4
    assert all("encoder_attn" in row.layer and "never receives" in (row.fallback or "") for row in dense)
