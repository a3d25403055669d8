"""Low-rank parts and outliers on every path from a solve to a loaded model: loaded weights equal solved ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from crosscal.compressors import Grid, GridOutliers
from crosscal.compressors.recipe import any_step
from crosscal.errors import ModelError, NotFinite
from crosscal.models import ModelSource, load_variant
from crosscal.progress import silent
from crosscal.publication import model_folder, publish_model
from crosscal.stages import solve as solving
from crosscal.stages.compress import layer_rows, publish_variant
from crosscal.stages.evaluate import checkpoint_files
from crosscal.stages.made_variants import note_made, take_blocks
from crosscal.stages.solve_site import SolvedMatrix
from crosscal.stages.solved_blocks import collect_block, publish_block
from crosscal.store import Store
from crosscal.variants import Variant
from tests.helpers.low_rank_variants import EORA, GPTQ, MIXED, PEFTS_OWN, RECIPES, context_of, folder_of, make, recipe
from tests.helpers.tiny_run import tiny_source, windows
from tests.helpers.written_models import contents

pytestmark = pytest.mark.usefixtures("quick_disk")
LINEARS = 7  # per Llama block
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, tuple[ModelSource, Store]]:
    """For each dtype a model and a store with its dense moments."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path_factory.mktemp("calibrated")
        made[dtype] = tiny_source(folder / "model", dtype), Store(folder / "home")
        context_of(folder / "run", *made[dtype])
    return made


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], SolvedMatrix]:
    """Solved matrices, before anything is written: (variant, layer) -> matrix."""
    seen: dict[tuple[str, str], SolvedMatrix] = {}
    solve = solving.solve_site

    def noting(*args: Any) -> Iterator[tuple[Variant, SolvedMatrix]]:
        for variant, layer in solve(*args):
            seen[variant.name, layer.row.layer] = layer
            yield variant, layer

    monkeypatch.setattr(solving, "solve_site", noting)
    return seen


@both_dtypes
def test_what_is_loaded_is_what_was_solved(tmp_path: Path, calibrated: dict, solved: dict, dtype: torch.dtype) -> None:
    """Base and factors equal the solution bit for bit, zeros and grids are kept, and outputs are those of V + L R."""
    context = context_of(tmp_path / "run", *calibrated[dtype])
    make(context, *RECIPES)
    assert len(solved) == len(RECIPES) * context.source.blocks * LINEARS
    models = {each.name: load_variant(folder_of(context, each)) for each in RECIPES}
    for (variant, name), layer in solved.items():
        linear, state = models[variant].get_submodule(name), layer.solution
        assert state.low_rank is not None
        assert torch.equal(linear.weight.float(), state.base.weight_OI)
        assert torch.equal(linear.low_rank_left_OK.float(), state.low_rank.left_OK)
        assert torch.equal(linear.low_rank_right_KI.float(), state.low_rank.right_KI)
        assert layer.row.rank == state.low_rank.left_OK.shape[1]
        assert isinstance(state.base, Grid) == ("packed" in variant)
        if variant.startswith(("pruned", "two", "together")):
            assert state.sparsity >= 0.5
        outputs = linear.double()(torch.eye(linear.in_features, dtype=torch.float64)).mT
        torch.testing.assert_close(outputs, state.weight_OI.double(), rtol=1e-5, atol=1e-6)


@both_dtypes
@pytest.mark.parametrize("held_out", [False, True])
def test_reported_losses_are_those_of_what_is_loaded(
    tmp_path: Path, calibrated: dict, dtype: torch.dtype, held_out: bool
) -> None:
    context = context_of(tmp_path / "run", *calibrated[dtype])
    make(context, *RECIPES)
    for each in RECIPES:
        model, dense = load_variant(folder_of(context, each)), load_variant(context.source.path)
        rows = {row.layer: row for row in layer_rows(context, [each])}
        assert len(rows) == context.source.blocks * LINEARS
        for block, site in [(index, site) for index in (0, 1) for site in context.cached.sites(index) or ()]:
            hessian_II = torch.zeros(site.inputs, site.inputs, dtype=torch.float64)
            for corpus, weight in MIXED.weights:
                drawn = context.samples[corpus, 0]
                (part,) = (drawn.held_out if held_out else drawn.calibration).parts
                moments = context.cached.read(part.key, block, site)
                hessian_II += weight * moments.gram_II.double() / moments.tokens
            for name in (f"model.layers.{block}.{matrix.name}" for matrix in site.matrices):
                linear, dense_OI = model.get_submodule(name), dense.get_submodule(name).weight.double()
                error_OI = dense_OI - linear.weight.double()
                error_OI = error_OI - linear.low_rank_left_OK.double() @ linear.low_rank_right_KI.double()
                true = float((error_OI @ hessian_II * error_OI).sum() / (dense_OI @ hessian_II * dense_OI).sum())
                row = rows[name]
                assert (row.heldout_relative_loss if held_out else row.relative_loss) == pytest.approx(true, rel=1e-3)


@both_dtypes
@pytest.mark.filterwarnings(PEFTS_OWN)
@pytest.mark.parametrize("each", RECIPES, ids=lambda each: each.name)
def test_peft_loads_base_and_adapter_and_gives_the_same_logits(
    tmp_path: Path, calibrated: dict, dtype: torch.dtype, each: Variant
) -> None:
    """Without crosscal: transformers loads the base, PEFT the adapter."""
    context = context_of(tmp_path / "run", *calibrated[dtype])
    make(context, each)
    folder, tokens = folder_of(context, each), windows(2, seed=5)
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        alone = base(tokens).logits  # packed weights are unpacked, in the stored dtype
        theirs = PeftModel.from_pretrained(nn.Module.float(base), folder / "adapter").eval()(tokens).logits
        ours = load_variant(folder).float()(tokens).logits
    assert (theirs - alone).abs().max() > 100 * (theirs - ours).abs().max()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_blocks_travel_through_the_store(tmp_path: Path, calibrated: dict) -> None:
    """Published as by Dask workers and collected as by the run, blocks give the same files."""
    source, store = calibrated[torch.float32]
    straight, sent = context_of(tmp_path / "straight", source, store), context_of(tmp_path / "sent", source, store)
    make(straight, *RECIPES)
    for block in range(source.blocks):
        assert publish_block(sent, block, RECIPES) == collect_block(sent, block, RECIPES) == len(RECIPES)
    for each in RECIPES:
        publish_variant(sent, each)
    assert contents(tmp_path / "sent" / "models") == contents(tmp_path / "straight" / "models")
    assert {problem for *_, problem in store.verify()} == {None}


@pytest.mark.parametrize("home", ["folder", "memory"])
def test_blocks_of_an_earlier_run_come_with_their_low_rank_parts(
    tmp_path: Path, calibrated: dict, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSCAL_CACHE", str(tmp_path / "cache"))
    source, _ = calibrated[torch.float32]
    store = Store(tmp_path / "home" if home == "folder" else f"memory://{tmp_path.name}-made")
    first, each = context_of(tmp_path / "first", source, store), RECIPES[2]
    make(first, each)
    note_made(first, each, checkpoint_files(folder_of(first, each)), layer_rows(first, [each]))
    second = context_of(tmp_path / "second", source, store)
    assert take_blocks(second, [each], silent) == source.blocks
    publish_variant(second, each)
    assert contents(tmp_path / "second" / "models") == contents(tmp_path / "first" / "models")
    # A changed adapter file makes its blocks unusable.
    weights = folder_of(first, each) / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert take_blocks(context_of(tmp_path / "third", source, store), [each], silent) == 0


@pytest.mark.parametrize("home", ["folder", "memory"])
def test_an_adapter_is_published_with_its_model(
    tmp_path: Path, calibrated: dict, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSCAL_CACHE", str(tmp_path / "cache"))
    context, each = context_of(tmp_path / "run", *calibrated[torch.float32]), RECIPES[0]
    make(context, each)
    store = Store(tmp_path / "home" if home == "folder" else f"memory://{tmp_path.name}-published")
    key = publish_model(store, folder_of(context, each), {})
    given = model_folder(store, key, tmp_path / "aside")
    assert checkpoint_files(given) == checkpoint_files(folder_of(context, each))
    assert "adapter/adapter_model.safetensors" in checkpoint_files(given)
    assert torch.equal(logits(load_variant(given)), logits(load_variant(folder_of(context, each))))
    assert [problem for *_, problem in store.verify()] == [None]
    if home == "folder":  # a change in it is detected
        file = next((tmp_path / "home").rglob("adapter_model.safetensors"))
        list(store.verify(quick=True))
        file.write_bytes(file.read_bytes() + b"!")
        assert [problem for *_, problem in Store(tmp_path / "home").verify(quick=True)] != [None]
    store.discard("models", key)
    assert not store.home.names(f"objects/models/{key}")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(windows(2, seed=5)).logits


@pytest.mark.parametrize("at", ["adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"])
def test_finishing_may_be_killed_anywhere(
    tmp_path: Path, calibrated: dict, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, each = context_of(tmp_path / "run", *calibrated[torch.float32]), RECIPES[0]
    make(context, each)
    expected = contents(folder_of(context, each))
    shutil.rmtree(context.folder)
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            make(context, each)
    make(context, each)
    assert contents(folder_of(context, each)) == expected
    publish_variant(context, each)  # finishing again changes nothing
    assert contents(folder_of(context, each)) == expected
    assert not list(folder_of(context, each).glob("adapter/block-*"))


@both_dtypes
def test_outliers_are_written_dense_with_the_values_of_the_form(
    tmp_path: Path, calibrated: dict, solved: dict, dtype: torch.dtype
) -> None:
    """Also with pruned weights and with a low-rank part; never as packed integers of a plain grid."""
    spqr = ("spqr", {"bits": 3, "group_size": 16})
    pruned = ("sparsegpt", {"sparsity": "2:4"})
    variants = [recipe("alone", spqr), recipe("pruned", pruned, spqr), recipe("low-rank", GPTQ, spqr, EORA)]
    context = context_of(tmp_path / "run", *calibrated[dtype])
    make(context, *variants)
    models = {each.name: load_variant(folder_of(context, each)) for each in variants}
    for (variant, name), layer in solved.items():
        base, linear = layer.solution.base, models[variant].get_submodule(name)
        assert isinstance(base, GridOutliers)
        assert torch.equal(linear.weight.float(), base.weight_OI)
        assert (layer.row.bits, layer.row.mean_bits) == (3, base.mean_bits)
        assert (layer.row.sparsity >= 0.5) == (variant == "pruned")
        assert hasattr(linear, "low_rank_left_OK") == (variant == "low-rank")
    assert all(each.grid is None for each in variants)
    for each in variants:
        config = json.loads((folder_of(context, each) / "config.json").read_text())
        assert "quantization_config" not in config


def test_rank_0_writes_no_adapter(tmp_path: Path, calibrated: dict) -> None:
    context = context_of(tmp_path / "run", *calibrated[torch.float32])
    none = recipe("none", ("sparsegpt", {"sparsity": 0.5}), ("eora", {"rank": 0}))
    plain = recipe("plain", ("sparsegpt", {"sparsity": 0.5}))
    make(context, none, plain)
    assert not any_step(none.steps, "has_low_rank")
    assert contents(folder_of(context, none)) == contents(folder_of(context, plain))
    assert all(row.rank is None for row in layer_rows(context, [none]))


def test_a_model_with_an_adapter_is_no_model_to_begin_with(tmp_path: Path, calibrated: dict) -> None:
    context, each = context_of(tmp_path / "run", *calibrated[torch.float32]), RECIPES[0]
    make(context, each)
    with pytest.raises(ModelError, match="low-rank parts"):
        ModelSource.open(folder_of(context, each))


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, calibrated: dict) -> None:
    context, each = context_of(tmp_path / "run", *calibrated[torch.float32]), RECIPES[0]
    make(context, each)
    file = folder_of(context, each) / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.1.mlp.up_proj.lora_A", b"layers.9.mlp.up_proj.lora_A"))
    with pytest.raises(ModelError, match=r"does not fit.*layers\.1\.mlp\.up_proj"):
        load_variant(folder_of(context, each))
    with pytest.raises(NotFinite, match="low-rank part"):
        context.writer(each).write_block(0, {"mlp.up_proj.lora_A.weight": torch.full((1, 32), torch.inf)})
