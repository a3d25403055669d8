"""Compression: cached equals uncached, killed runs resume, and reported losses equal losses computed from the files."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crosscal.compressors import problem, quadratic_loss
from crosscal.models import ModelSource
from crosscal.models.loading import load_variant
from crosscal.progress import silent
from crosscal.stages import compress, solve_site
from crosscal.stages.block_problem import BlockProblem
from crosscal.stages.compress import RunContext, compress_block, compress_sequential, layer_rows, publish_variant
from crosscal.stages.solve import solve_block
from crosscal.statistics import InputMoments
from crosscal.store import Store
from crosscal.variants import Variant
from tests.helpers.tiny_run import run_context, sample, tiny_source, variant, windows
from tests.helpers.tiny_variants import MIXED, VARIANTS, calibrated, compress_all, samples
from tests.helpers.written_models import contents, rows_without_times

pytestmark = pytest.mark.usefixtures("quick_disk")
ROUNDOFF_F32 = 1e-4


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
