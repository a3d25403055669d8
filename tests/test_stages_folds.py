"""Models whose norms absorb a recipe's scales: equal outputs, correct losses, equal files however they are made."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from crosscal.errors import PlanError
from crosscal.models import ModelSource
from crosscal.models.loading import load_variant
from crosscal.models.packing import TRANSPOSED
from crosscal.models.sites import Site
from crosscal.plan import CompressionPlan
from crosscal.progress import silent
from crosscal.report.rows import LayerRow, ResultRow, read_rows
from crosscal.stages.compress import RunContext, compress_block, compress_sequential, layer_rows, publish_variant
from crosscal.stages.made_variants import note_made, take_blocks
from crosscal.stages.solve import solve_block
from crosscal.stages.solved_blocks import collect_block, publish_block
from crosscal.statistics import Mixture
from crosscal.store import Store, digest_file
from crosscal.variants import KEEP_DENSE, RecipeStep, Variant, variants
from tests.helpers.tiny_models import load_plain, save_model, windows
from tests.helpers.tiny_place import crosscal, make_place
from tests.helpers.tiny_run import collect, run_context, sample

FAMILIES = ("llama", "gemma2", "gpt2", "opt", "phi", "qwen3-moe", "deepseek-v3", "gpt-oss", "falcon-new", "bloom")
ROUNDOFF_F32 = 1e-4
AWQ = ("awq", {"bits": 3, "group_size": 4})


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests do not cover power failures."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def recipe(name: str, *steps: tuple[str, dict[str, Any]], **more: Any) -> Variant:
    made = tuple(RecipeStep(method, tuple(settings.items())) for method, settings in steps)
    return Variant(name, made, Mixture.of({"general": 1.0}), more.pop("upstream", "dense"), 0, False, **more)


FOLDED = recipe("folded", AWQ)
ROUNDED = recipe("rounded", AWQ, ("rtn", {"bits": 3, "group_size": 4}))
SOLVED = recipe("solved", AWQ, ("gptq", {"bits": 3, "group_size": 8, "damping": 0.01}))
PRUNED = recipe("pruned", AWQ, ("sparsegpt", {"sparsity": 0.5, "damping": 0.01}), ("refit", {}))
PLAIN = recipe("plain", ("rtn", {"bits": 3, "group_size": 4}))
EVERY = [FOLDED, ROUNDED, SOLVED, PRUNED, PLAIN]
REPAIRED = recipe("repaired", AWQ, ("rtn", {"bits": 3, "group_size": 4}), ("eora", {"rank": 4}))
SPLIT = recipe("split", AWQ, ("3basil", {"sparsity": 0.5, "rank": 4}), ("refit", {}))
ASIDE = recipe("aside", AWQ, ("spqr", {"bits": 3, "group_size": 8}))
BIASED = recipe("biased", AWQ, ("rtn", {"bits": 3, "group_size": 4}), ("bias", {}))


def context_of(folder: Path, family: str, dtype: torch.dtype = torch.float32, count: int = 40) -> RunContext:
    """A model of a family, with a few large norm gains, and its moments. Every expert receives tokens."""
    weights = save_model(family, folder / "model", dtype=dtype) / "model.safetensors"
    tensors = load_file(weights)
    for tensor in (tensor for name, tensor in tensors.items() if tensor.ndim == 1 and name.endswith("weight")):
        tensor[::7] += 6
    save_file(tensors, weights, metadata={"format": "pt"})
    source = ModelSource.open(folder / "model")
    store = Store(folder / "home")
    context = run_context(folder / "run", store, source, sample(store, "general", windows(count, seed=1)))
    collect(context.cached, source, [key for each in context.samples.values() for key in each.sets])
    return context


def make(context: RunContext, wanted: list[Variant]) -> None:
    for block in range(context.source.blocks):
        compress_block(context, block, wanted)
    for each in wanted:
        publish_variant(context, each)


def sites_of(context: RunContext) -> list[tuple[int, Site]]:
    return [(block, site) for block in range(context.source.blocks) for site in context.cached.sites(block) or ()]


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


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


@pytest.mark.parametrize("each", [ROUNDED, PRUNED], ids=lambda each: each.name)
@torch.no_grad()
def test_sequential_inputs_come_through_the_folded_blocks(each: Variant, tmp_path: Path) -> None:
    """A later block's moments are those of the model as written, before that block's own norm is divided. A killed run
    resumes to the same model."""
    context = context_of(tmp_path, "llama")
    each = dataclasses.replace(each, upstream="sequential")
    compress_sequential(context, each, batch_tokens=64, report=silent)
    publish_variant(context, each)
    made = context.folder / "models" / each.name
    model, dense = load_variant(made, dtype=torch.float64), load_plain(context.source.path)
    entering: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model(windows(40, seed=1)[:-2], use_cache=False)
    input_TI = dense.model.layers[1].input_layernorm(entering[0]).flatten(0, 1)
    energies = {  # tr(W H Wᵀ) of the dense matrix on these inputs
        row.layer: float((input_TI @ dense.get_parameter(f"{row.layer}.weight").double().mT).square().sum())
        for row in layer_rows(context, [each])
        if row.site == "self_attn.q_proj" and row.block == 1
    }
    for row in layer_rows(context, [each]):
        if row.layer in energies:
            assert row.fold == "input_layernorm"
            assert row.loss / row.relative_loss == pytest.approx(energies[row.layer] / len(input_TI), rel=ROUNDOFF_F32)
    before = contents(made)
    for late in (1, 2):
        (made / f"block-{late:05d}.safetensors").unlink()
    (made / "model.safetensors.index.json").unlink()
    shutil.rmtree(tmp_path / "home")
    again = context_of(tmp_path, "llama")
    compress_sequential(again, each, batch_tokens=64, report=silent)
    publish_variant(again, each)
    assert contents(made) == before


def test_blocks_of_other_machines_and_runs_are_the_same(tmp_path: Path) -> None:
    context = context_of(tmp_path, "gemma2")
    make(context, EVERY)
    expected = contents(context.folder / "models")
    away = dataclasses.replace(context, folder=tmp_path / "away")
    for block in range(context.source.blocks):
        publish_block(context, block, EVERY)
        assert collect_block(away, block, EVERY) == len(EVERY)
    for each in EVERY:
        publish_variant(away, each)
    assert contents(away.folder / "models") == expected
    folded = [row.fold for row in layer_rows(context, EVERY)]
    assert folded == [row.fold for row in layer_rows(away, EVERY)]
    later = dataclasses.replace(context, folder=tmp_path / "later")
    for each in EVERY:
        made = context.folder / "models" / each.name
        files = {name: digest for name, digest in contents(made).items() if name.endswith(".safetensors")}
        note_made(context, each, files, layer_rows(context, [each]))
    assert take_blocks(later, EVERY, silent) == len(EVERY) * context.source.blocks
    for each in EVERY:
        publish_variant(later, each)
    assert contents(later.folder / "models") == expected


def test_a_site_that_stays_dense_divides_no_norm(tmp_path: Path) -> None:
    """With few tokens H is singular: without damping, solves fail and the plan's fallback keeps these sites dense."""
    context = context_of(tmp_path, "llama", count=3)
    each = recipe("kept", AWQ, ("sparsegpt", {"sparsity": 0.5, "damping": 0.0}), fallback=KEEP_DENSE)
    make(context, [each])
    rows = layer_rows(context, [each])
    kept = {row.layer for row in rows if row.fallback}
    assert kept
    assert {row.fold for row in rows if row.fallback} == {None}
    dense, made = (load_plain(path).state_dict() for path in (context.source.path, context.folder / "models" / "kept"))
    for block, site in ((block, site) for block, site in sites_of(context) if site.producer):
        prefix = f"{context.source.block_name(block)}."
        assert site.producer
        for name in [*site.producer.parameters, *(matrix.parameter for matrix in site.matrices)]:
            assert torch.equal(dense[prefix + name], made[prefix + name]) == (prefix + site.name in kept)


def test_a_plan_with_awq_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    scales, at = {"method": "awq", "bits": 3, "group_size": 32}, {"domain": "legal", "alpha": 0.5}
    rounding = [{"method": name, "bits": 4, "group_size": 32} for name in ("rtn", "gptq")]
    place.write_plan(compress=[{**at, "steps": [scales, last]} for last in rounding] + [{**at, **scales}])
    run = Path(place.run()["run_dir"])
    rows = {row.variant: row for row in read_rows(run / "results.jsonl", ResultRow) if row.corpus_or_task == "legal"}
    names = [
        "awq-bits3-groupsize32-rtn-w4g32-legal-a0.5",
        "awq-bits3-groupsize32-gptq-w4g32-legal-a0.5",
        "awq-bits3-groupsize32-legal-a0.5",
    ]
    assert list(rows) == ["dense", *names]
    assert [amount["text"] for amount in rows[names[0]].amounts] == ["4 bits g32"]
    assert rows[names[2]].amounts == []
    assert rows[names[2]].value == pytest.approx(rows["dense"].value, rel=1e-4)
    layers = read_rows(run / "layers.jsonl", LayerRow)
    assert {row.fold for row in layers if row.site == "self_attn.q_proj"} == {"input_layernorm"}
    assert {row.fold for row in layers if row.site == "mlp.down_proj"} == {"none: no norm makes its input"}
    assert {row.bits for row in layers if row.variant == names[2]} == {None}


def test_scales_come_before_rounding(tmp_path: Path) -> None:
    entry = {"steps": [{"method": "rtn", "bits": 4}, {"method": "awq", "bits": 4}]}
    plan = CompressionPlan.model_validate({"model": "m", "corpora": {"general": "g"}, "compress": [entry]})
    with pytest.raises(PlanError, match=r"compress\.0: .*rtn \+ awq"):
        variants(plan)
    place = make_place(tmp_path)
    place.write_plan(compress=[entry])
    assert crosscal("plan", "check", str(place.plan), "--home", str(place.home)).code == 2
