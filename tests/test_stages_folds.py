"""Models whose norms absorb a recipe's scales: equal outputs, correct losses, and stored as solved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from crosscal.models.loading import load_variant
from crosscal.models.packing import TRANSPOSED
from crosscal.stages.compress import RunContext, layer_rows
from crosscal.stages.solve import solve_block
from crosscal.variants import Variant
from tests.helpers.folded_variants import AWQ, EVERY, FOLDED, PLAIN, ROUNDED, context_of, make, recipe, sites_of
from tests.helpers.tiny_models import load_plain, windows

pytestmark = pytest.mark.usefixtures("quick_disk")
FAMILIES = ("llama", "gemma2", "gpt2", "opt", "phi", "qwen3-moe", "deepseek-v3", "gpt-oss", "falcon-new", "bloom")
REPAIRED = recipe("repaired", AWQ, ("rtn", {"bits": 3, "group_size": 4}), ("eora", {"rank": 4}))
SPLIT = recipe("split", AWQ, ("3basil", {"sparsity": 0.5, "rank": 4}), ("refit", {}))
ASIDE = recipe("aside", AWQ, ("spqr", {"bits": 3, "group_size": 8}))
BIASED = recipe("biased", AWQ, ("rtn", {"bits": 3, "group_size": 4}), ("bias", {}))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(windows(3, seed=9), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_alone_change_no_output_of_the_loaded_checkpoint(family: str, tmp_path: Path) -> None:
    context = context_of(tmp_path, family)
    make(context, [FOLDED])
    made = tmp_path / "run" / "models" / "folded"
    before, after = logits(load_plain(context.source.path)), logits(load_plain(made))
    assert (after - before).norm() <= 1e-5 * before.norm()
    dense, stored = load_plain(context.source.path).state_dict(), load_plain(made).state_dict()
    rows = {row.layer: row for row in layer_rows(context, [FOLDED])}
    changed: dict[bool, list[bool]] = {True: [], False: []}
    for block, site in sites_of(context):
        prefix = f"{context.source.block_name(block)}."
        folds = {rows[prefix + matrix.name].fold for matrix in site.matrices}
        assert folds == {site.producer.name if site.producer else f"none: {site.no_producer}"}
        made_by = site.producer.parameters if site.producer else ()
        for name in (*made_by, *(matrix.parameter for matrix in site.matrices)):
            changed[bool(made_by)].append(not torch.equal(dense[prefix + name], stored[prefix + name]))
    assert any(changed[True])
    assert not any(changed[False])
    assert all(row.relative_loss <= 1e-10 for row in rows.values())
    assert not (json.loads((made / "config.json").read_text()).get("quantization_config"))


@torch.no_grad()
def true_relative_losses(context: RunContext, each: Variant) -> dict[str, float]:
    """‖W x - V x'‖² / ‖W x‖² of every matrix, from the loaded models alone: x is its input in the dense model, x' the
    output of the variant's norm for the dense model's input of that norm."""
    dense = load_plain(context.source.path, torch.float64)
    made = load_variant(context.folder / "models" / each.name, dtype=torch.float64)
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _, args, kwargs: inputs.__setitem__(name, args[0] if args else next(iter(kwargs.values())))

    for name, module in dense.named_modules():
        module.register_forward_pre_hook(note(name), with_kwargs=True)
    dense(windows(40, seed=1)[:-2], use_cache=False)
    found: dict[str, float] = {}
    for block, site in sites_of(context):
        prefix = f"{context.source.block_name(block)}."
        for matrix in site.matrices:
            x = inputs[prefix + matrix.name]
            moved = x
            if site.producer:
                moved = made.get_submodule(prefix + site.producer.name)(inputs[prefix + site.producer.name])
            modules = [model.get_submodule(prefix + matrix.name) for model in (dense, made)]
            wanted, given = (module(rows) for module, rows in zip(modules, (x, moved), strict=True))
            energy = (wanted - modules[0](torch.zeros_like(x))).square().sum()
            found[prefix + matrix.name] = float((wanted - given).square().sum() / energy)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_reported_losses_are_those_of_the_files(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """LayerNorm's bias is also rounded to the stored dtype: GPT-2 in bfloat16 has a larger tolerance."""
    context = context_of(tmp_path, family, dtype)
    make(context, EVERY)
    for each in EVERY:
        expected = true_relative_losses(context, each)
        rows = [row for row in layer_rows(context, [each]) if row.fallback is None]
        assert {row.layer for row in rows} == expected.keys()
        rounding = 1e-3 if (family, dtype) == ("gpt2", torch.bfloat16) else 1e-6
        for row in rows:
            assert row.relative_loss == pytest.approx(expected[row.layer], rel=2e-3 + rounding, abs=rounding)
            assert (row.fold is None) == (each is PLAIN)


@pytest.mark.parametrize(
    ("family", "each"),
    [(f, v) for f in ("llama", "gpt2") for v in (REPAIRED, SPLIT, ASIDE, BIASED) if (f, v) != ("llama", BIASED)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_losses_behind_scales_are_true_in_every_form(family: str, each: Variant, tmp_path: Path) -> None:
    context = context_of(tmp_path, family)
    make(context, [each])
    expected = true_relative_losses(context, each)
    rows = [row for row in layer_rows(context, [each]) if row.fallback is None]
    assert {row.layer for row in rows} == expected.keys()
    for row in rows:
        assert row.relative_loss == pytest.approx(expected[row.layer], rel=2e-3, abs=1e-6)


def test_scales_help_where_a_few_inputs_are_large(tmp_path: Path) -> None:
    """Summed over a scaled site's matrices, the loss is at most that of plain rounding: r = 0 is tried."""
    context = context_of(tmp_path, "llama")
    make(context, [ROUNDED, PLAIN])
    of = {each.name: {row.layer: row.loss for row in layer_rows(context, [each])} for each in (ROUNDED, PLAIN)}
    for block, site in sites_of(context):
        layers = [f"{context.source.block_name(block)}.{matrix.name}" for matrix in site.matrices]
        folded, plain = (sum(of[name][layer] for layer in layers) for name in ("rounded", "plain"))
        assert folded <= plain * (1 + 1e-6) if site.producer else folded == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_what_is_loaded_is_what_was_solved(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    context = context_of(tmp_path, family, dtype)
    make(context, EVERY)
    for each in EVERY:
        state = load_variant(context.folder / "models" / each.name).state_dict()
        for block in range(context.source.blocks):
            solution = solve_block(context.problem(block, context.cached), [each])[each.name]
            for name, tensor in solution.dense.items():
                assert torch.equal(state[f"{context.source.block_name(block)}.{name}"], tensor.to(dtype)), name
    grids = {row.layer: row.bits for row in layer_rows(context, [ROUNDED]) if row.fallback is None}
    assert set(grids.values()) == {3}
    whys = {row.written_dense for row in layer_rows(context, [ROUNDED]) if row.fallback is None}
    assert whys == ({TRANSPOSED} if family == "gpt2" else {None})


def test_the_stored_dtype_rounds_a_fold_once(tmp_path: Path) -> None:
    """In bfloat16 the weights compensate the rounding of the norm: gain · weight, which multiplies the input, differs
    only by the rounding of the weight."""
    for family in ("llama", "gemma2"):
        context = context_of(tmp_path / family, family, torch.bfloat16)
        make(context, [FOLDED])
        dense, made = (
            load_plain(path).state_dict() for path in (context.source.path, context.folder / "models" / "folded")
        )
        for block, site in ((block, site) for block, site in sites_of(context) if site.producer):
            prefix = f"{context.source.block_name(block)}."
            assert site.producer
            gains = [state[prefix + site.producer.parameters[0]] + site.producer.offset for state in (dense, made)]
            for matrix in site.matrices:
                pairs = zip((dense, made), gains, strict=True)
                before, after = (state[prefix + matrix.parameter] * gain for state, gain in pairs)
                torch.testing.assert_close(after, before, rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-9)
