"""Moments over pairs of dense and compressed inputs: storage, reuse, mixing, and losses of models solved with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from crosscal.calibration.sets import windows_by_key
from crosscal.compressors import COMPRESSORS, Site, Statistic
from crosscal.models import ModelSource
from crosscal.models.loading import load_variant
from crosscal.progress import silent
from crosscal.stages import compress
from crosscal.stages.block_problem import BlockProblem
from crosscal.stages.compress import RunContext, compress_sequential, layer_rows, publish_variant
from crosscal.stages.moments import CachedMoments
from crosscal.statistics import VECTORS
from crosscal.store import Store
from crosscal.variants import Variant
from tests.helpers.corrected_variants import CORRECTED, GPTQ, MIXED, PLAIN, QEP, recipe
from tests.helpers.tiny_models import load_plain
from tests.helpers.tiny_run import run_context, sample, tiny_source, windows
from tests.helpers.written_models import contents, rows_without_times
from tests.test_models_cross import plain_inputs

pytestmark = pytest.mark.usefixtures("quick_disk")
ROUNDOFF_F32 = 2e-4
SITES = 8
NORMALISED = recipe("normalised", QEP, ("sparsegpt", {"sparsity": 0.6}), trace_normalised=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("model"))


def context_of(folder: Path, store: Store, source: ModelSource) -> RunContext:
    general = sample(store, "general", windows(10, seed=1))
    legal = sample(store, "legal", windows(6, seed=2, high=100), windows(4, seed=3, high=50))
    return run_context(folder, store, source, general, legal)


def solved(context: RunContext, each: Variant):
    done = compress_sequential(context, each, batch_tokens=64, report=silent)
    publish_variant(context, each)
    return done


def cached_of(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> list[CachedMoments]:
    """Return a list that collects the stored moments of each sequential variant that is solved later."""
    found: list[CachedMoments] = []
    walk = compress.InMemoryMoments.of
    monkeypatch.setattr(compress.InMemoryMoments, "of", lambda cached, seen: found.append(cached) or walk(cached, seen))
    return found


def test_cross_moments_are_separate_artifacts_stored_only_if_needed(store: Store, source: ModelSource) -> None:
    context = context_of(Path(store.location).parent / "run", store, source)
    solved(context, PLAIN)
    sets = sum(len(each.sets) for each in context.samples.values())
    sums = [artifact.provenance["sums"] for artifact in store.list("moments")]
    assert sorted(sums) == sorted([["gram"], [w for w in Statistic if w in VECTORS]] * SITES * sets)
    solved(context, CORRECTED)
    sums = [artifact.provenance["sums"] for artifact in store.list("moments")]
    assert len(sums) == (2 + 3) * SITES * sets
    assert sums.count(["cross", "drift"]) == SITES * sets
    assert all(problem is None for _, _, problem in store.verify())


@pytest.mark.parametrize("each", [CORRECTED, NORMALISED], ids=lambda each: each.name)
def test_a_model_made_again_reads_nothing_and_is_the_same(
    tmp_path: Path, store: Store, source: ModelSource, each: Variant
) -> None:
    first = context_of(tmp_path / "first", store, source)
    tokens = sum(of.tokens for of in first.samples.values())
    assert solved(first, each).tokens_read == tokens
    assert solved(context_of(tmp_path / "second", store, source), each).tokens_read == 0
    assert contents(tmp_path / "first" / "models") == contents(tmp_path / "second" / "models")
    assert rows_without_times(tmp_path / "first") == rows_without_times(tmp_path / "second")


def test_a_killed_run_goes_on_to_the_same_model(
    tmp_path: Path, store: Store, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved(context_of(tmp_path / "undisturbed", Store(tmp_path / "another home"), source), CORRECTED)
    context, write = context_of(tmp_path / "killed", store, source), compress._write

    def die(context: RunContext, one: Variant, problem: BlockProblem, *args: Any) -> None:
        if problem.block == 1:
            raise KeyboardInterrupt
        write(context, one, problem, *args)

    monkeypatch.setattr(compress, "_write", die)
    with pytest.raises(KeyboardInterrupt):
        solved(context, CORRECTED)
    monkeypatch.setattr(compress, "_write", write)
    for artifact in store.list("moments"):
        if artifact.provenance["block"] == 1:
            store.discard("moments", artifact.key)
    assert solved(context, CORRECTED).tokens_read > 0
    assert contents(tmp_path / "killed" / "models") == contents(tmp_path / "undisturbed" / "models")
    assert rows_without_times(tmp_path / "killed") == rows_without_times(tmp_path / "undisturbed")


SEEN: dict[str, dict[Statistic, Tensor]] = {}


@dataclass(frozen=True)
class Spy:
    """Records the statistics of every site and changes nothing."""

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Statistic.GRAM, Statistic.CROSS})
    version: ClassVar = 1

    def __call__(self, site: Site) -> Site:
        SEEN[site.layers[0].name] = {which: site.statistics[which].clone() for which in self.needs}
        return site


@pytest.mark.parametrize("normalised", [False, True])
def test_pairs_are_mixed_as_h_is(
    tmp_path: Path, store: Store, source: ModelSource, normalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with float64 means computed here from the stored sums of every set."""
    monkeypatch.setitem(COMPRESSORS, "spy", Spy)
    SEEN.clear()
    context = context_of(tmp_path / "run", store, source)
    stored = cached_of(context, monkeypatch)
    each = recipe("spied", ("spy", {}), ("wanda", {"sparsity": 0.5}), trace_normalised=normalised)
    solved(context, each)
    for block in range(source.blocks):
        for site in stored[0].sites(block) or ():
            means: dict[str, dict[Statistic, Tensor]] = {}
            for corpus in MIXED.corpora:
                parts = context.samples[corpus, 0].calibration.parts
                read = [(part.weight, stored[0].read(part.key, block, site)) for part in parts]
                mass = sum(weight * moments.tokens for weight, moments in read)
                means[corpus] = {w: torch.stack([k * m[w].double() for k, m in read]).sum(0) / mass for w in Spy.needs}
            traces = {corpus: float(of[Statistic.GRAM].trace()) for corpus, of in means.items()}
            trace = sum(weight * traces[corpus] for corpus, weight in MIXED.weights)
            scale = {corpus: trace / traces[corpus] if normalised else 1.0 for corpus in traces}
            found = SEEN[f"{source.block_name(block)}.{site.matrices[0].name}"]
            for which in Spy.needs:
                mixed_II = torch.stack([w * scale[corpus] * means[corpus][which] for corpus, w in MIXED.weights]).sum(0)
                bound = 1e-5 * float(mixed_II.abs().max())
                torch.testing.assert_close(found[which].double(), mixed_II, rtol=0, atol=bound)


def true_losses(context: RunContext, each: Variant, *, held_out: bool) -> dict[str, float]:
    """E‖W x - V y‖² / E‖W x‖² in float64, from forward passes of two plain models over the windows.

    A block's inputs y come from a model that is compressed before this block and dense in it, as when it was solved.
    """
    dense, model = load_plain(context.source.path), load_plain(context.source.path)
    written = load_variant(context.folder / "models" / each.name).double().state_dict()
    sums: dict[str, list[float]] = {}
    for block in range(context.source.blocks):
        prefix = f"{context.source.block_name(block)}."
        for corpus, weight in MIXED.weights:
            split = context.samples[corpus, 0].held_out if held_out else context.samples[corpus, 0].calibration
            mass = sum(part.mass for part in split.parts)
            for part in split.parts:
                tokens_SL = windows_by_key(context.cached.store, part.key)
                x, y = plain_inputs(dense, tokens_SL), plain_inputs(model, tokens_SL)
                for name in (name for name in x if name.startswith(prefix)):
                    outputs_TO = x[name] @ dense.get_parameter(f"{name}.weight").detach().mT
                    error_TO = outputs_TO - y[name] @ written[f"{name}.weight"].mT
                    both = sums.setdefault(name, [0.0, 0.0])
                    both[0] += weight * part.weight / mass * float(error_TO.square().sum())
                    both[1] += weight * part.weight / mass * float(outputs_TO.square().sum())
        model.load_state_dict({name: value for name, value in written.items() if name.startswith(prefix)}, strict=False)
    return {name: loss / energy for name, (loss, energy) in sums.items()}


def test_reported_losses_are_those_of_the_dense_models_outputs(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    context = context_of(tmp_path / "run", store, source)
    solved(context, CORRECTED)
    rows = layer_rows(context, [CORRECTED])
    assert len(rows) == 2 * 7
    reported = {row.layer: row.relative_loss for row in rows}
    assert reported == pytest.approx(true_losses(context, CORRECTED, held_out=False), rel=ROUNDOFF_F32)
    reported = {row.layer: row.heldout_relative_loss for row in rows}
    assert reported == pytest.approx(true_losses(context, CORRECTED, held_out=True), rel=ROUNDOFF_F32)


def test_correcting_comes_closer_to_the_dense_outputs(tmp_path: Path, store: Store, source: ModelSource) -> None:
    """After the first block, which has no upstream error. With `propagation` 0 the recipe equals the plain one."""
    context = context_of(tmp_path / "run", store, source)
    none = recipe("none", ("qep", {"propagation": 0.0, "damping": 1.0}), GPTQ)
    full = recipe("full", ("qep", {"propagation": 1.0, "damping": 0.01}), GPTQ)
    for each in (PLAIN, none, full):
        solved(context, each)
    of = {each.name: contents(context.folder / "models" / each.name) for each in (PLAIN, none, full)}
    assert of["plain"] == of["none"] != of["full"]
    losses = {each.name: {r.layer: r.relative_loss for r in layer_rows(context, [each])} for each in (none, full)}
    for name, loss in losses["none"].items():
        if ".layers.0." in name:
            assert losses["full"][name] == pytest.approx(loss, rel=1e-3)
        else:
            assert losses["full"][name] < loss
