"""Compression: cached equals uncached, killed runs resume, and reported losses equal losses computed from the files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crosscal.compressors import COMPRESSORS, LayerProblem, Sparsity, problem, quadratic_loss
from crosscal.errors import NotPositiveDefinite, StatisticsError
from crosscal.models import ModelSource
from crosscal.models.loading import load_variant
from crosscal.progress import silent
from crosscal.stages import compress, solve_site
from crosscal.stages.block_problem import BlockProblem, SiteStatistics, grouped, needed
from crosscal.stages.compress import RunContext, compress_block, compress_sequential, layer_rows, publish_variant
from crosscal.stages.sample import Sample, over_sums
from crosscal.stages.solve import solve_block
from crosscal.stages.solve_site import _relative_loss
from crosscal.statistics import InputMoments, Mixture
from crosscal.store import Store
from crosscal.variants import Variant
from tests.helpers.tiny_run import (
    collect,
    part,
    run_context,
    sample,
    sums,
    tiny_source,
    variant,
    windows,
)

ROUNDOFF_F32 = 1e-4
MIXED = {"general": 0.25, "legal": 0.75}
VARIANTS = [
    variant("sparse", "sparsegpt", MIXED, sparsity=0.5, damping=0.01),
    variant("two-of-four", "sparsegpt", MIXED, sparsity="2:4", damping=0.01),
    variant("general", "wanda", {"general": 1.0}, sparsity=0.5),
    variant("quantized", "gptq", MIXED, bits=4, group_size=32, damping=0.01),
    variant("ordered", "gptq", {"legal": 1.0}, bits=3, group_size=32, activation_order=True, damping=0.05),
    variant("rounded", "rtn", None, bits=4, group_size=32),
    variant("magnitude", "magnitude", None, sparsity=0.5),
    variant("normalised", "sparsegpt", MIXED, sparsity=0.5, damping=0.01, trace_normalised=True),
]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests do not cover power failures."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each dtype a model and a store with its dense moments; tests work on copies of the store."""
    folder = tmp_path_factory.mktemp("made")
    for dtype in (torch.float32, torch.bfloat16):
        source, store = tiny_source(folder / str(dtype) / "model", dtype), Store(folder / str(dtype) / "home")
        calibrated(folder / "run", store, source)
    return folder


@pytest.fixture(params=[torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def store(tmp_path: Path, made: Path, dtype: torch.dtype) -> Store:
    return Store(shutil.copytree(made / str(dtype) / "home", tmp_path / "home"))


@pytest.fixture
def source(made: Path, dtype: torch.dtype) -> ModelSource:
    return ModelSource.open(made / str(dtype) / "model")


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str, indirect=True)


def samples(store: Store) -> tuple[Sample, Sample]:
    general = sample(store, "general", windows(10, seed=1))
    return general, sample(store, "legal", windows(6, seed=2, high=100), windows(4, seed=3, high=50))


def calibrated(folder: Path, store: Store, source: ModelSource) -> RunContext:
    context = run_context(folder, store, source, *samples(store))
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    return context


def compress_all(context: RunContext, variants: list[Variant] = VARIANTS) -> None:
    for block in range(context.source.blocks):
        compress_block(context, block, variants)
    for each in variants:
        publish_variant(context, each)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows_without_times(folder: Path) -> dict[str, list[dict]]:
    return {
        str(file.relative_to(folder)): [{**json.loads(line), "seconds": None} for line in file.read_text().splitlines()]
        for file in sorted((folder / "layers").rglob("*.jsonl"))
    }


def test_cached_is_uncached_and_a_sweep_is_its_variants(tmp_path: Path, store: Store, source: ModelSource) -> None:
    """One sweep, and each variant alone with another store's moments, give bit-identical models."""
    compress_all(calibrated(tmp_path / "sweep", store, source))
    other = Store(tmp_path / "another home")
    for each in VARIANTS:
        compress_all(calibrated(tmp_path / "alone", other, source), [each])
    assert contents(tmp_path / "sweep" / "models") == contents(tmp_path / "alone" / "models")
    assert rows_without_times(tmp_path / "sweep") == rows_without_times(tmp_path / "alone")


def test_each_set_is_read_once_per_site(tmp_path: Path, store: Store, source: ModelSource) -> None:
    context = calibrated(tmp_path / "run", store, source)
    read: list[tuple] = []

    class Counting(type(context.cached)):
        def read(self, calibration, block, site) -> InputMoments:
            read.append((calibration, block, site.name))
            return super().read(calibration, block, site)

    counting = Counting(**{f.name: getattr(context.cached, f.name) for f in dataclasses.fields(context.cached)})
    compress_block(dataclasses.replace(context, cached=counting), 0, VARIANTS)
    assert len(read) == len(set(read)) == 4 * sum(len(each.sets) for each in context.samples.values())


def test_a_killed_run_goes_on_and_solves_only_what_is_missing(
    tmp_path: Path, store: Store, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress_all(calibrated(tmp_path / "undisturbed", store, source))
    context = calibrated(tmp_path / "killed", store, source)
    write, solved = compress._write, []

    def die(context: RunContext, each: Variant, *args) -> None:
        if each.name == "quantized":
            raise KeyboardInterrupt
        write(context, each, *args)

    monkeypatch.setattr(compress, "_write", die)
    with pytest.raises(KeyboardInterrupt):
        compress_block(context, 0, VARIANTS)
    monkeypatch.undo()
    monkeypatch.setattr(
        compress, "solve_block", lambda problem, todo: solved.extend(todo) or solve_block(problem, todo)
    )
    assert compress_block(context, 0, VARIANTS) == len(VARIANTS) - 3
    assert [each.name for each in solved] == [each.name for each in VARIANTS[3:]]
    assert compress_block(context, 0, VARIANTS) == 0
    compress_all(context)
    assert contents(tmp_path / "killed" / "models") == contents(tmp_path / "undisturbed" / "models")
    assert rows_without_times(tmp_path / "killed") == rows_without_times(tmp_path / "undisturbed")


def true_relative_losses(context: RunContext, each: Variant, *, held_out: bool) -> dict[str, float]:
    """tr(dW H dWᵀ) / tr(W H Wᵀ) in float64, computed only from checkpoint files and stored moments."""
    dense = load_file(context.source.path / "model.safetensors")
    model, found = load_variant(context.folder / "models" / each.name), {}
    for block, site in [(index, site) for index in (0, 1) for site in context.cached.sites(index) or ()]:
        weights = (each.mixture or context.reference).as_dict()
        hessians = {corpus: torch.zeros(site.inputs, site.inputs, dtype=torch.float64) for corpus in weights}
        for corpus, hessian_II in hessians.items():
            found_in = context.samples[corpus, 0].held_out if held_out else context.samples[corpus, 0].calibration
            mass = sum(each_set.mass for each_set in found_in.parts)
            for each_set in found_in.parts:
                moments = context.cached.read(each_set.key, block, site)
                hessian_II += each_set.weight * moments.gram_II.double() / mass
        trace = sum(weights[corpus] * float(hessians[corpus].trace()) for corpus in weights)
        scales = {c: trace / float(h.trace()) if each.trace_normalised else 1.0 for c, h in hessians.items()}
        hessian_II = torch.stack([weights[c] * scales[c] * h for c, h in hessians.items()]).sum(0)
        for layer in (f"model.layers.{block}.{matrix.name}" for matrix in site.matrices):
            dense_OI = dense[f"{layer}.weight"].double()
            error_OI = dense_OI - model.get_parameter(f"{layer}.weight").detach().double()
            found[layer] = float((error_OI @ hessian_II * error_OI).sum() / (dense_OI @ hessian_II * dense_OI).sum())
    return found


@both_dtypes
def test_reported_losses_are_those_of_the_files(tmp_path: Path, store: Store, source: ModelSource) -> None:
    context = calibrated(tmp_path / "run", store, source)
    compress_all(context)
    for each in VARIANTS:
        rows = layer_rows(context, [each])
        assert all(row.relative_loss > 0 and row.fallback is None for row in rows)
        reported = {row.layer: row.relative_loss for row in rows}
        assert reported == pytest.approx(true_relative_losses(context, each, held_out=False), rel=ROUNDOFF_F32)
        reported = {row.layer: row.heldout_relative_loss for row in rows}
        assert reported == pytest.approx(true_relative_losses(context, each, held_out=True), rel=ROUNDOFF_F32)


def test_what_losses_are_relative_to_is_computed_once_a_mixture(
    tmp_path: Path, store: Store, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sweep computes losses of its changes only: tr(W H Wᵀ) is read from the store, with the same value."""
    several = [VARIANTS[0], VARIANTS[1], variant("damped", "sparsegpt", MIXED, sparsity=0.5, damping=0.1)]
    compress_all(calibrated(tmp_path / "first", store, source), several)
    kept = list(store.keys("energies"))
    assert len(kept) == source.blocks
    measured: list[torch.Tensor] = []
    monkeypatch.setattr(solve_site, "quadratic_loss", lambda d, h: measured.append(d) or quadratic_loss(d, h))
    monkeypatch.setattr(problem, "quadratic_loss", lambda d, h: measured.append(d) or quadratic_loss(d, h))
    compress_all(calibrated(tmp_path / "second", store, source), several)
    assert len(measured) == 2 * source.blocks * 7 * len(several)  # of changes, calibration and held-out
    assert list(store.keys("energies")) == kept
    assert rows_without_times(tmp_path / "first") == rows_without_times(tmp_path / "second")


@both_dtypes
def test_packed_models_hold_exactly_the_solved_weights(tmp_path: Path, store: Store, source: ModelSource) -> None:
    context = calibrated(tmp_path / "run", store, source)
    each = VARIANTS[3]
    compress_all(context, [each])
    model = load_variant(tmp_path / "run" / "models" / each.name)
    for block in range(2):
        solution = solve_block(context.problem(block, context.cached), [each])[each.name]
        assert not any(name.endswith("proj.weight") for name in solution.changed)
        assert len(solution.dense) == 7
        for name, tensor in solution.dense.items():
            assert torch.equal(model.get_parameter(f"model.layers.{block}.{name}"), tensor)


# --- sequential ------------------------------------------------------------------------------------------------------


SEQUENTIAL = [
    variant("sequential", "sparsegpt", MIXED, sparsity=0.5, damping=0.01, upstream="sequential"),
    variant("packed", "gptq", MIXED, bits=4, group_size=32, damping=0.01, upstream="sequential"),
]


def sequentially(context: RunContext, each: Variant):
    done = compress_sequential(context, each, batch_tokens=64, report=silent)
    publish_variant(context, each)
    return done


@pytest.mark.parametrize("each", SEQUENTIAL, ids=lambda each: each.name)
def test_a_sequential_model_made_again_reads_nothing_and_is_the_same(
    tmp_path: Path, store: Store, source: ModelSource, each: Variant
) -> None:
    parts = samples(store)
    tokens = sum(each.tokens for each in parts)
    first = sequentially(run_context(tmp_path / "first", store, source, *parts), each)
    assert (first.tokens_read, first.hits, first.misses) == (tokens, 0, 2 * 4 * 6)
    second = sequentially(run_context(tmp_path / "second", store, source, *parts), each)
    assert (second.tokens_read, second.hits, second.misses) == (0, 2 * 4 * 6, 0)
    assert contents(tmp_path / "first" / "models") == contents(tmp_path / "second" / "models")
    assert rows_without_times(tmp_path / "first") == rows_without_times(tmp_path / "second")


@pytest.mark.parametrize("each", SEQUENTIAL, ids=lambda each: each.name)
def test_a_killed_sequential_run_goes_on_to_the_same_model(
    tmp_path: Path, store: Store, source: ModelSource, each: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Store(tmp_path / "another home")
    sequentially(run_context(tmp_path / "undisturbed", other, source, *samples(other)), each)
    context, write = run_context(tmp_path / "killed", store, source, *samples(store)), compress._write

    def die(context: RunContext, one: Variant, problem: BlockProblem, *args) -> None:
        if problem.block == 1:
            raise KeyboardInterrupt
        write(context, one, problem, *args)

    monkeypatch.setattr(compress, "_write", die)
    with pytest.raises(KeyboardInterrupt):
        sequentially(context, each)
    monkeypatch.undo()
    sequentially(context, each)
    assert contents(tmp_path / "killed" / "models") == contents(tmp_path / "undisturbed" / "models")
    assert rows_without_times(tmp_path / "killed") == rows_without_times(tmp_path / "undisturbed")


def test_dense_and_sequential_agree_on_the_first_block_and_differ_after_it(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    context, dense = calibrated(tmp_path / "run", store, source), VARIANTS[0]
    compress_all(context, [dense])
    sequentially(context, SEQUENTIAL[0])
    one, other = (load_variant(context.folder / "models" / each.name) for each in (dense, SEQUENTIAL[0]))
    for name, parameter in one.named_parameters():
        same = torch.equal(parameter, other.get_parameter(name))
        assert same == (".layers.1." not in name or "norm" in name), name


def test_sequential_moments_of_other_data_under_the_same_names_are_not_taken(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    """Both runs mix `general` with `legal` and share `general`, but their compressed upstream blocks differ."""
    general, legal = samples(store)
    sequentially(run_context(tmp_path / "earlier", store, source, general, legal), SEQUENTIAL[0])
    other_legal = sample(store, "legal", windows(6, seed=9, low=200))
    sequentially(run_context(tmp_path / "later", store, source, general, other_legal), SEQUENTIAL[0])

    fresh = Store(tmp_path / "fresh")
    parts = samples(fresh)[0], sample(fresh, "legal", windows(6, seed=9, low=200))
    sequentially(run_context(tmp_path / "alone", fresh, source, *parts), SEQUENTIAL[0])
    assert contents(tmp_path / "later" / "models") == contents(tmp_path / "alone" / "models")


# --- layers that cannot be solved ------------------------------------------------------------------------------------


def starved(tmp_path: Path, store: Store, source: ModelSource) -> RunContext:
    """One window of 32 tokens for 64 inputs: without damping the Hessian of `down_proj` is singular."""
    few = (sums(part(store, windows(1, seed))) for seed in (5, 6))
    context = run_context(tmp_path / "run", store, source, Sample("general", 0, *few))
    collect(context.cached, source, context.samples["general", 0].sets)
    return context


def test_what_cannot_be_solved_is_an_error_that_names_the_layer(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    each = variant("undamped", "sparsegpt", {"general": 1.0}, sparsity=0.5, damping=0.0)
    with pytest.raises(NotPositiveDefinite, match=r"model\.layers\.0\.mlp\.down_proj: .*Raise damping"):
        compress_block(starved(tmp_path, store, source), 0, [each])


def test_a_fallback_that_the_plan_names_is_listed_and_nothing_else_changes(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    context = starved(tmp_path, store, source)
    each = variant("undamped", "sparsegpt", {"general": 1.0}, sparsity=0.5, damping=0.0, fallback="keep-dense")
    sound = variant("damped", "sparsegpt", {"general": 1.0}, sparsity=0.5, damping=0.01)
    compress_all(context, [each, sound])
    rows = {row.layer: row for row in layer_rows(context, [each])}
    kept = {name for name, row in rows.items() if row.fallback}
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} <= kept
    assert all(row.fallback is None for row in layer_rows(context, [sound]))
    dense = load_file(source.path / "model.safetensors")
    model = load_variant(context.folder / "models" / "undamped")
    for name, row in rows.items():
        weight = model.get_parameter(f"{name}.weight")
        assert (row.parameters, row.stays_dense) == (weight.numel(), name in kept)
        assert torch.equal(weight, dense[f"{name}.weight"]) == (name in kept)
        if row.fallback:
            assert row.fallback.startswith("keep-dense: ")
            assert "not positive definite" in row.fallback
            assert (row.relative_loss, row.tokens) == (0.0, 0)


def test_a_loss_relative_to_nothing_is_no_loss_of_zero() -> None:
    """If the output energy is zero, the relative loss is None, not 0."""
    layer = LayerProblem(name="silent", weight_OI=torch.ones(4, 4), hessian_II=torch.eye(4))
    solution = COMPRESSORS["magnitude"](Sparsity.parse(0.5)).compress(layer)
    assert _relative_loss(layer, solution, torch.zeros(4, 4), 0.0) is None
    assert _relative_loss(layer, solution, torch.eye(4), 16.0) == 0.5


# --- from corpora to sets --------------------------------------------------------------------------------------------


def test_mixtures_are_keyed_by_the_digests_of_their_sums(store: Store) -> None:
    by_name: Mapping[str, Sample] = {each.corpus: each for each in samples(store)}
    for is_held_out in (False, True):
        keys = {each.keys[is_held_out]: MIXED[name] for name, each in by_name.items()}
        assert over_sums(Mixture.of(MIXED), by_name, held_out=is_held_out).as_dict() == keys


def hessians_of(context: RunContext, mixture: Mapping[str, float], **more) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (calibration, held-out) Hessians of every site of the second block, as a solve reads them."""
    problem = context.problem(1, context.cached)
    each = variant("any", "sparsegpt", mixture, sparsity=0.5, damping=0.01, **more)
    groups = grouped(problem, [each])
    (group,) = groups
    for site in problem.sites:
        statistics = SiteStatistics(problem, site, needed(groups), users=len(groups))
        yield statistics(group)[0].hessian_II, statistics(group, held_out=True)[0].hessian_II


def in_shards(store: Store, corpus: str, tokens_SL: Tensor, *counts: int) -> Sample:
    """A corpus that landed in shards of `counts` windows; all windows are used for both splits."""
    parts = sums(*(part(store, part_SL) for part_SL in tokens_SL.split(counts)))
    return Sample(corpus, 0, parts, parts)


@pytest.mark.parametrize("mixture", [{"legal": 1.0}, MIXED, {"general": 0.9, "legal": 0.1}])
@pytest.mark.parametrize("trace_normalised", [False, True])
def test_how_a_corpus_landed_changes_no_hessian(
    tmp_path: Path, store: Store, source: ModelSource, mixture: dict[str, float], trace_normalised: bool
) -> None:
    """With one shard or several of different scales: mixing and trace normalisation apply to whole corpora."""
    quiet, loud = windows(4, seed=7, high=20), windows(8, seed=8, low=200)
    tokens = {"general": windows(6, seed=0), "legal": torch.cat([quiet, loud])}
    found = []
    for counts in ((12,), (4, 8), (1, 3, 5, 3)):
        landed = [
            in_shards(store, "general", tokens["general"], 6),
            in_shards(store, "legal", tokens["legal"], *counts),
        ]
        context = run_context(tmp_path / str(counts), store, source, *landed)
        collect(context.cached, source, [key for each in landed for key in each.sets])
        found.append(list(hessians_of(context, mixture, trace_normalised=trace_normalised)))
    for whole, *others in zip(*found, strict=True):
        for other, (expected_II, held_out_II) in itertools.product(others, [whole]):
            bound = 1e-5 * float(expected_II.abs().max())
            torch.testing.assert_close(other[0], expected_II, rtol=0, atol=bound)
            torch.testing.assert_close(other[1], held_out_II, rtol=0, atol=bound)


def test_one_corpus_alone_is_not_changed_by_normalising(tmp_path: Path, store: Store, source: ModelSource) -> None:
    context = calibrated(tmp_path / "run", store, source)  # `legal` has two shards
    plain, normalised = (list(hessians_of(context, {"legal": 1.0}, trace_normalised=on)) for on in (False, True))
    for one, other in zip(plain, normalised, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_corpus_without_tokens_is_an_error_of_the_groups_that_mix_it(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    context = calibrated(tmp_path / "run", store, source)
    starved = {each.key for each in context.samples["legal", 0].calibration.parts}

    class Starving(type(context.cached)):
        def read(self, calibration, block, site) -> InputMoments:
            found = super().read(calibration, block, site)
            return InputMoments.zero(found.inputs) if calibration in starved else found

    cached = Starving(**{f.name: getattr(context.cached, f.name) for f in dataclasses.fields(context.cached)})
    problem = context.problem(0, cached)
    groups = grouped(problem, [VARIANTS[2], VARIANTS[4]])
    sound, starving = groups
    statistics = SiteStatistics(problem, problem.sites[0], needed(groups), users=len(groups))
    expected = context.cached.read(context.samples["general", 0].calibration.key, 0, problem.sites[0]).hessian_II()
    assert torch.equal(statistics(sound)[0].hessian_II, expected)
    with pytest.raises(StatisticsError, match=r"\(legal\): no calibration token reached"):
        statistics(starving)
    assert statistics(starving, held_out=True)[1] > 0
