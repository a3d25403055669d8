"""Low-rank parts and outliers on every path from a solve to a loaded model: loaded weights equal solved ones."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
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
from crosscal.models import ModelSource, VariantWriter, adapter, load_variant
from crosscal.plan import parse_plan
from crosscal.progress import silent
from crosscal.publication import model_folder, publish_model
from crosscal.stages import solve as solving
from crosscal.stages.compress import RunContext, compress_block, compress_sequential, layer_rows, publish_variant
from crosscal.stages.evaluate import checkpoint_files
from crosscal.stages.made_variants import note_made, take_blocks
from crosscal.stages.solve_site import SolvedMatrix
from crosscal.stages.solved_blocks import collect_block, publish_block
from crosscal.statistics import Mixture
from crosscal.store import Store
from crosscal.tasks.refusals import refusals, unnameable
from crosscal.variants import RecipeStep, Variant
from tests.helpers.tiny_models import save_model
from tests.helpers.tiny_place import crosscal, make_place, values
from tests.helpers.tiny_run import collect, run_context, sample, tiny_source, windows
from tests.helpers.tiny_text import tiny_tokenizer

MIXED = Mixture.of({"general": 0.25, "legal": 0.75})
LEGAL = Mixture.of({"legal": 1.0})
LINEARS = 7  # per Llama block


def recipe(name: str, *steps: tuple[str, Mapping[str, Any]], upstream: str = "dense", own: Mixture | None = None):
    made = [RecipeStep(method, tuple(settings.items())) for method, settings in steps]
    made[-1] = RecipeStep(made[-1].method, made[-1].settings, own)
    return Variant(name, tuple(made), MIXED, upstream, 0, False)


EORA = ("eora", {"rank": 4})
GPTQ = ("gptq", {"bits": 4, "group_size": 32})
RECIPES = [
    recipe("pruned", ("sparsegpt", {"sparsity": 0.5}), EORA),
    recipe("two-of-four", ("sparsegpt", {"sparsity": "2:4"}), EORA),
    recipe("packed", GPTQ, EORA, own=LEGAL),
    recipe("pruned-and-packed", ("sparsegpt", {"sparsity": "2:4"}), GPTQ, EORA),
    recipe("together", ("3basil", {"sparsity": 0.5, "rank": 3, "iterations": 20})),
    recipe("together-two-of-four", ("3basil", {"sparsity": "2:4", "rank": 3, "iterations": 20})),
    recipe("together-packed", ("3basil", {"sparsity": 0.5, "rank": 3, "iterations": 20}), GPTQ, ("scales", {})),
    recipe("twice", ("3basil", {"sparsity": 0.5, "rank": 20, "iterations": 20}), ("eora", {"rank": 30})),
]
PEFTS_OWN = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, tuple[ModelSource, Store]]:
    """For each dtype a model and a store with its dense moments."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path_factory.mktemp("calibrated")
        made[dtype] = tiny_source(folder / "model", dtype), Store(folder / "home")
        context_of(folder / "run", *made[dtype])
    return made


def context_of(folder: Path, source: ModelSource, store: Store) -> RunContext:
    both = sample(store, "general", windows(10, seed=1)), sample(store, "legal", windows(6, seed=2, high=100))
    context = run_context(folder, store, source, *both)
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    return context


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


def make(context: RunContext, *variants: Variant) -> None:
    for block in range(context.source.blocks):
        compress_block(context, block, variants)
    for each in variants:
        publish_variant(context, each)


def folder_of(context: RunContext, variant: Variant) -> Path:
    return context.folder / "models" / variant.name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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


@pytest.mark.filterwarnings(PEFTS_OWN)
@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "phi3", "falcon-parallel", "opt", "bloom"])
def test_other_families_are_named_as_peft_names_them(tmp_path: Path, family: str) -> None:
    """Transposed linears, linears with biases, various names, differing ranks, and linears without a low-rank part."""
    source = ModelSource.open(save_model(family, tmp_path / "model"))
    chance = torch.Generator().manual_seed(0)
    writer = VariantWriter(tmp_path / "variant", source)
    for block in range(source.blocks):
        module = source.weights.model.get_submodule(source.block_name(block))
        changed, shapes = {}, {name: shape_OI(part) for name, part in module.named_modules()}
        for name, shape in shapes.items():
            if shape is not None and (block > 0 or "attn" in name or "attention" in name):
                changed[f"{name}.lora_B.weight"] = torch.randn(shape[0], 2 + block, generator=chance)
                changed[f"{name}.lora_A.weight"] = torch.randn(2 + block, shape[1], generator=chance)
        assert changed
        writer.write_block(block, changed)
    writer.finish()
    with torch.no_grad():
        tokens = windows(2, seed=5, high=96)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "variant")
        theirs = PeftModel.from_pretrained(base, tmp_path / "variant" / "adapter").eval()
        loaded = {name for name, _ in theirs.named_modules() if name.endswith(("lora_A.default", "lora_B.default"))}
        ours = load_variant(tmp_path / "variant")
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "variant" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert loaded == {f"base_model.model.{name}.lora_{side}.default" for name in written for side in "AB"}


def shape_OI(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if type(module).__name__ == "Conv1D" else None


# --- how blocks are passed on ----------------------------------------------------------------------------------------


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


# --- sequential upstream and killed runs -----------------------------------------------------------------------------

SEQUENTIAL = [
    recipe("sequential", ("sparsegpt", {"sparsity": 0.5}), EORA, upstream="sequential"),
    recipe("sequential-packed", GPTQ, EORA, upstream="sequential"),
]


def sequentially(context: RunContext, each: Variant) -> None:
    compress_sequential(context, each, batch_tokens=64, report=silent)
    publish_variant(context, each)


def test_later_blocks_see_the_low_rank_parts_before_them(tmp_path: Path, calibrated: dict) -> None:
    """The moments of a sequential walk equal those of the loaded model's inputs."""
    source, _ = calibrated[torch.float32]
    context, each = context_of(tmp_path / "run", source, Store(tmp_path / "home")), SEQUENTIAL[0]
    sequentially(context, each)
    model, inputs = load_variant(folder_of(context, each)), []
    model.get_submodule("model.layers.1.self_attn.q_proj").register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    (part,) = context.samples["legal", 0].calibration.parts
    with torch.no_grad():
        model(windows(6, seed=2, high=100)[:-2])
    inputs_TI = inputs[0].flatten(0, 1).double()
    upstream = {a.provenance["upstream"] for a in context.cached.store.list("moments")} - {"dense"}
    (name,) = upstream
    cached = type(context.cached)(context.cached.store, context.cached.model, name, context.cached.dtype)
    site = next(site for site in cached.sites(1) or () if site.name == "self_attn.q_proj")
    gram_II = cached.read(part.key, 1, site).gram_II.double()
    torch.testing.assert_close(gram_II, inputs_TI.mT @ inputs_TI, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("each", "dtype"),
    list(zip(SEQUENTIAL, (torch.float32, torch.bfloat16), strict=True)),
    ids=("sparse", "packed-bfloat16"),
)
@pytest.mark.parametrize("at", ["before the adapter", "between adapter and block", "after the block"])
def test_a_killed_sequential_run_goes_on_to_the_same_model(
    tmp_path: Path, calibrated: dict, each: Variant, dtype: torch.dtype, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = calibrated[dtype]
    undisturbed = context_of(tmp_path / "undisturbed", source, Store(tmp_path / "another home"))
    sequentially(undisturbed, each)
    context = context_of(tmp_path / "killed", source, Store(tmp_path / "home"))
    whole, written = adapter.save_tensors, VariantWriter.write_block

    def die_at(tensors: Mapping[str, Tensor], file: Path) -> None:
        if file.name == "block-00001.safetensors":
            if at == "between adapter and block":
                whole(tensors, file)
            raise KeyboardInterrupt
        whole(tensors, file)

    def die_after(self: VariantWriter, block: int, *args: Any, **more: Any) -> None:
        written(self, block, *args, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if at == "after the block":
            patched.setattr(VariantWriter, "write_block", die_after)
        else:
            patched.setattr(adapter, "save_tensors", die_at)
        with pytest.raises(KeyboardInterrupt):
            sequentially(context, each)
    sequentially(context, each)
    assert contents(tmp_path / "killed" / "models") == contents(tmp_path / "undisturbed" / "models")


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


def test_a_plan_makes_measures_and_takes_them_again(tmp_path: Path) -> None:
    """From the command line: base and adapter are evaluated together, also with blocks taken from another run."""
    place = make_place(tmp_path)
    steps = [{"method": "sparsegpt", "sparsity": 0.7}, {"method": "eora", "rank": [0, 16]}]
    place.write_plan(compress=[{"domain": "legal", "upstream": ["dense", "sequential"], "steps": steps}])
    place.run()
    place.run("--out", str(tmp_path / "other"))
    assert contents(tmp_path / "other" / "models") == contents(place.run_dir / "models")
    assert values(tmp_path / "other" / "results.jsonl") == values(place.run_dir / "results.jsonl")
    plain, repaired = (f"sparsegpt-70-eora-rank{rank}-legal-a0.5" for rank in (0, 16))
    bases = [contents(place.run_dir / "models" / name) for name in (plain, repaired)]
    assert bases[0] == {name: content for name, content in bases[1].items() if not name.startswith("adapter/")}
    assert measured(place.run_dir, plain) != measured(place.run_dir, repaired)
    # Merged into dense matrices, and evaluated as a separate model.
    model = load_variant(place.run_dir / "models" / repaired)
    for linear in (linear for linear in model.modules() if hasattr(linear, "low_rank_left_OK")):
        linear.weight.data += linear.low_rank_left_OK @ linear.low_rank_right_KI
    model.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    place.write_plan(model=str(tmp_path / "merged"), compress=[])
    place.run("--out", str(tmp_path / "of the merged"))
    expected = measured(tmp_path / "of the merged", "dense")
    assert measured(place.run_dir, repaired) == pytest.approx(expected, rel=1e-4)


def measured(run_dir: Path, variant: str) -> list[float]:
    return [row[4] for row in values(run_dir / "results.jsonl") if row[0] == variant]


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


def test_plan_check_names_what_is_written_dense(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.write_plan(compress=[{"method": ["spqr", "gptq"], "bits": 3, "group_size": 16}])
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["written_dense"]["variants"] == ["spqr-w3g16-general"]


# --- models without low-rank parts, and refusals ---------------------------------------------------------------------


def test_rank_0_writes_no_adapter(tmp_path: Path, calibrated: dict) -> None:
    context = context_of(tmp_path / "run", *calibrated[torch.float32])
    none = recipe("none", ("sparsegpt", {"sparsity": 0.5}), ("eora", {"rank": 0}))
    plain = recipe("plain", ("sparsegpt", {"sparsity": 0.5}))
    make(context, none, plain)
    assert not any_step(none.steps, "has_low_rank")
    assert contents(folder_of(context, none)) == contents(folder_of(context, plain))
    assert all(row.rank is None for row in layer_rows(context, [none]))


def test_experts_are_refused_before_anything_is_solved_and_never_written(tmp_path: Path) -> None:
    source, store = ModelSource.open(save_model("mixtral", tmp_path / "model")), Store(tmp_path / "home")
    stacks = adapter.stacked_experts(source.weights.model)
    assert len(stacks) == source.blocks
    for each in RECIPES:
        assert "cannot name one expert" in str(next(unnameable([each], stacks)))
        assert not list(unnameable([each], []))
    assert not list(unnameable([recipe("none", ("sparsegpt", {"sparsity": 0.5}), ("eora", {"rank": 0}))], stacks))
    context = run_context(
        tmp_path / "run",
        store,
        source,
        *(sample(store, corpus, windows(200, seed=1, high=96)) for corpus in ("general", "legal")),
    )
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    with pytest.raises(ModelError, match="cannot name one expert"):
        compress_block(context, 0, [RECIPES[0]])
    assert not list((tmp_path / "run" / "models").rglob("*.safetensors"))


def test_a_plan_for_a_model_with_experts_is_refused(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("mixtral", tmp_path / "model"))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    entry = {"steps": [{"method": "wanda", "sparsity": 0.5}, {"method": "eora", "rank": [0, 4]}]}
    plan = parse_plan({"model": "m", "corpora": {"general": "g"}, "compress": [entry]})
    (refusal,) = refusals(plan, source, [])
    assert re.fullmatch(
        r"model\.layers\.0\.mlp\.experts and 2 more: .*\(got wanda-50-eora-rank4-general\)\. .*", str(refusal)
    )


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
