"""Bias correction: its loss against float64 outputs, and the biases of saved and loaded models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from crosscal.compressors import GPTQ, Bias, EoRA, LayerProblem, SparseGPT, Sparsity, Statistic, run
from crosscal.compressors.problem import solved
from crosscal.compressors.recipe import site_of
from crosscal.errors import ModelError
from crosscal.models import ModelSource, load_variant
from crosscal.models.sites import without_bias
from crosscal.stages.compress import compress_block, layer_rows, publish_variant
from crosscal.statistics import Mixture
from crosscal.store import Store
from crosscal.tasks.refusals import unbiased
from crosscal.variants import RecipeStep, Variant
from tests.helpers.problems import correlated_inputs_TI
from tests.helpers.tiny_models import save_model
from tests.helpers.tiny_run import collect, run_context, sample, windows

STEPS = [
    [SparseGPT(Sparsity.parse(0.7)), Bias()],
    [GPTQ(2, 32), Bias(), EoRA(3)],
    [SparseGPT(Sparsity.parse("2:4")), EoRA(3), Bias()],
    [Bias()],
]


@pytest.mark.parametrize("stored_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "+".join(type(step).__name__ for step in steps))
def test_the_loss_is_the_mean_squared_error_of_the_outputs(steps: list, stored_dtype: torch.dtype | None) -> None:
    chance = torch.Generator().manual_seed(1)
    input_TI = correlated_inputs_TI(300, 64, seed=1) + 0.7 * torch.randn(64, generator=chance).double()
    weight_OI, bias_O = torch.randn(20, 64, generator=chance).double(), torch.randn(20, generator=chance).double()
    if stored_dtype is not None:
        weight_OI, bias_O = (part.to(stored_dtype).double() for part in (weight_OI, bias_O))
    further = {Statistic.SUM: input_TI.mean(0)}
    second_II = input_TI.mT @ input_TI / len(input_TI)
    problem = LayerProblem("x", weight_OI, second_II, further, stored_dtype=stored_dtype, bias_O=bias_O)
    solution = solved(problem, run(site_of([problem]), steps).layers[0])
    assert solution.bias_change_O is not None
    new_O = bias_O + solution.bias_change_O
    if stored_dtype is not None:
        assert torch.equal(new_O, new_O.to(stored_dtype).double())
    error_TO = input_TI @ weight_OI.mT + bias_O - (input_TI @ solution.weight_OI.mT + new_O)
    assert solution.loss == pytest.approx(float(error_TO.square().sum(1).mean()), rel=1e-9, abs=1e-12)
    without = solved(problem, run(site_of([problem]), [step for step in steps if not isinstance(step, Bias)]).layers[0])
    assert solution.loss <= without.loss
    if isinstance(steps[-1], Bias) and stored_dtype is None:
        mean_I, change_OI = further[Statistic.SUM], weight_OI - solution.weight_OI
        centred_II = second_II - torch.outer(mean_I, mean_I)
        assert solution.loss == pytest.approx(float((change_OI @ centred_II * change_OI).sum()), rel=1e-9, abs=1e-12)
        assert error_TO.mean(0).abs().max() < 1e-12


def corrected(name: str, *steps: tuple[str, dict]) -> Variant:
    recipe = tuple(RecipeStep(method, tuple(settings.items())) for method, settings in steps)
    return Variant(name, recipe, Mixture.of({"general": 0.25, "legal": 0.75}), "dense", 0, False)


VARIANTS = [
    corrected("pruned", ("sparsegpt", {"sparsity": 0.6}), ("bias", {})),
    corrected("rounded", ("gptq", {"bits": 3, "group_size": 16}), ("eora", {"rank": 2}), ("bias", {})),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt-neox"])
def test_reported_losses_are_those_of_the_loaded_biases(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    source, store = ModelSource.open(save_model(family, tmp_path / "model", dtype=dtype)), Store(tmp_path / "home")
    assert not list(unbiased(VARIANTS, without_bias(source.weights.model)))
    drawn = [sample(store, corpus, windows(12, seed=len(corpus), high=96)) for corpus in ("general", "legal")]
    context = run_context(tmp_path / "run", store, source, *drawn)
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    for block in range(source.blocks):
        compress_block(context, block, VARIANTS)
    dense = load_variant(source.path)
    for variant in VARIANTS:
        publish_variant(context, variant)
        model = load_variant(context.folder / "models" / variant.name)
        rows = {row.layer: row for row in layer_rows(context, [variant])}
        places = [(block, site) for block in range(source.blocks) for site in context.cached.sites(block) or ()]
        for block, site in places:
            for matrix in site.matrices:
                name = f"{source.block_name(block)}.{matrix.name}"
                was, now, row = dense.get_submodule(name), model.get_submodule(name), rows[name]
                units_II, nothing_1I = torch.eye(site.inputs).double(), torch.zeros(1, site.inputs).double()
                change_IO = was.double()(units_II) - now.double()(units_II)
                shift_O = (was(nothing_1I) - now(nothing_1I))[0]
                change_OI, dense_OI = (change_IO - shift_O).mT, (was(units_II) - was(nothing_1I)).mT
                assert shift_O.any()
                for held_out, reported in ((False, row.relative_loss), (True, row.heldout_relative_loss)):
                    loss = energy = 0.0
                    for corpus, weight in variant.mixture.weights:  # pyright: ignore[reportOptionalMemberAccess]
                        each = context.samples[corpus, 0]
                        (part,) = (each.held_out if held_out else each.calibration).parts
                        moments = context.cached.read(part.key, block, site)
                        gram_II, mean_I = moments.gram_II.double() / moments.tokens, moments.sum_I / moments.tokens
                        loss += weight * float((change_OI @ gram_II * change_OI).sum() + shift_O.square().sum())
                        loss += weight * 2 * float(shift_O @ (change_OI @ mean_I.double()))
                        energy += weight * float((dense_OI @ gram_II * dense_OI).sum())
                    assert reported == pytest.approx(loss / energy, rel=2e-3)


def test_linears_without_a_bias_are_named_before_anything_runs_and_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    source, store = ModelSource.open(save_model("qwen2", tmp_path / "model")), Store(tmp_path / "home")
    lacking = without_bias(source.weights.model)
    assert lacking == ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    (refusal,) = unbiased(VARIANTS, lacking)
    assert all(name in str(refusal) for name in lacking)
    assert not list(unbiased([corrected("plain", ("rtn", {"bits": 4, "group_size": 16}))], lacking))
    drawn = [sample(store, corpus, windows(12, seed=len(corpus), high=96)) for corpus in ("general", "legal")]
    context = run_context(tmp_path / "run", store, source, *drawn)
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    with pytest.raises(ModelError, match=r"no bias to correct"):
        compress_block(context, 0, VARIANTS[:1])
    assert not list((tmp_path / "run" / "models").rglob("*.safetensors"))
