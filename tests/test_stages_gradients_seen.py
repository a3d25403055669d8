"""Gradients that steps receive: mixed by the weights of H, always of the dense model, and only where declared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from crosscal.compressors import COMPRESSORS, Site, Statistic
from crosscal.errors import MissingArtifact, StatisticsError
from crosscal.models import ModelSource
from crosscal.progress import silent
from crosscal.stages.block_problem import gradients_needed, statistics_needed
from crosscal.stages.compress import RunContext, compress_block, compress_sequential
from crosscal.stages.folding import sets_to_read
from crosscal.stages.gradients import KIND, CachedGradients, Gradients
from crosscal.statistics import Gradient, Mixture
from crosscal.store import Store
from crosscal.variants import RecipeStep, Variant
from tests.helpers.spies import MIXED, OWN, samples, spied
from tests.helpers.tiny_gradients import walk
from tests.helpers.tiny_run import (
    collect,
    run_context,
    tiny_source,
    variant,
)

pytestmark = pytest.mark.usefixtures("quick_disk")
SEEN: dict[str, dict[str, Tensor]] = {}


@dataclass(frozen=True)
class Spy:
    """Records the gradients of every layer and changes nothing."""

    name: str

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Gradient.SQUARE})
    version: ClassVar = 1

    def __call__(self, site: Site) -> Site:
        shown = {layer.name: site.statistics.grad_square_OI(layer.name).clone() for layer in site.layers}
        SEEN.setdefault(self.name, {}).update(shown)
        return site


@dataclass(frozen=True)
class Prying(Spy):
    """Requests gradients that only another step of its recipe declares."""

    needs: ClassVar = frozenset({Statistic.SQUARE_SUM})


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    for name, step in (("spy", Spy), ("prying", Prying)):
        monkeypatch.setitem(COMPRESSORS, name, step)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("model"))


def prepared(folder: Path, store: Store, source: ModelSource, *asked: Variant) -> RunContext:
    """Return the context that a run over these variants has before it solves."""
    context = run_context(folder, store, source, *samples(store))
    context = dataclasses.replace(context, cached=dataclasses.replace(context.cached, wanted=statistics_needed(asked)))
    collect(context.cached, source, [key for each in context.samples.values() for key in each.sets])
    cached = CachedGradients(context.cached)
    for place in sorted(gradients_needed(asked, context.reference)):
        walk(cached, source, sets_to_read(cached, source.blocks, context.samples[place], held_out=False))
    return dataclasses.replace(context, gradients=Gradients(cached, context.samples))


def solved(folder: Path, store: Store, source: ModelSource, *asked: Variant) -> RunContext:
    context = prepared(folder, store, source, *asked)
    for block in range(source.blocks):
        compress_block(context, block, asked)
    return context


def expected(context: RunContext, mixture: Mapping[str, float], *, normalised: bool) -> dict[str, Tensor]:
    """Means computed from the sums of every set: per window of a corpus, then mixed over corpora."""
    assert context.gradients is not None
    found: dict[str, Tensor] = {}
    for block in range(context.source.blocks):
        for site in context.cached.sites(block) or ():
            scale, means = {}, {}
            for corpus in mixture:
                parts = context.samples[corpus, 0].calibration.parts
                read = [(part.weight, context.gradients.cached.read(part.key, block, site)) for part in parts]
                mass = sum(weight * sums.windows for weight, sums in read)
                moments = [(part.weight, context.cached.read(part.key, block, site)) for part in parts]
                squares = sum(weight * float(each[Statistic.SQUARE_SUM].sum()) for weight, each in moments)
                scale[corpus] = squares / sum(weight * each.tokens for weight, each in moments)
                means[corpus] = {
                    matrix.name: sum(weight * sums.squares[matrix.name].double() for weight, sums in read) / mass
                    for matrix in site.matrices
                }
            mean = sum(weight * scale[corpus] for corpus, weight in mixture.items())
            factor = {c: mean / scale[c] if normalised else 1.0 for c in mixture}
            for matrix in site.matrices:
                name = f"{context.source.block_name(block)}.{matrix.name}"
                found[name] = sum(w * factor[c] * means[c][matrix.name] for c, w in mixture.items())
    return found


def assert_close(seen: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert seen.keys() == wanted.keys()
    for name, mean_OI in seen.items():
        bound = 1e-5 * float(wanted[name].abs().max())
        torch.testing.assert_close(mean_OI.double(), wanted[name], rtol=0, atol=bound)


@pytest.mark.parametrize("normalised", [False, True])
def test_gradients_are_mixed_by_the_weights_that_h_is(
    tmp_path: Path, store: Store, source: ModelSource, normalised: bool
) -> None:
    context = solved(tmp_path / "run", store, source, spied("all", normalised=normalised))
    assert_close(SEEN["all"], expected(context, MIXED.as_dict(), normalised=normalised))
    assert_close(SEEN["all-own"], expected(context, OWN.as_dict(), normalised=False))


def test_a_sequential_walk_shows_the_dense_gradients(tmp_path: Path, store: Store, source: ModelSource) -> None:
    """Also after compressed blocks."""
    walked = spied("walked", upstream="sequential")
    pruned = RecipeStep("magnitude", (("sparsity", 0.9),))
    context = prepared(tmp_path / "run", store, source, walked)
    compress_sequential(
        context, dataclasses.replace(walked, recipe=(pruned, *walked.recipe)), batch_tokens=64, report=silent
    )
    assert_close(SEEN["walked"], expected(context, MIXED.as_dict(), normalised=False))


def test_who_does_not_declare_gradients_is_not_shown_them(tmp_path: Path, store: Store, source: ModelSource) -> None:
    with pytest.raises(StatisticsError, match="does not declare"):
        solved(tmp_path / "run", store, source, spied("more", "prying"))


def test_only_the_corpora_of_steps_that_declare_them_are_walked() -> None:
    general, legal = Mixture.of({"general": 1.0}), Mixture.of({"legal": 1.0})
    gblm = variant("a", "gblm", {"legal": 1.0}, sparsity=0.5)
    own = dataclasses.replace(gblm, mixture=legal, recipe=(dataclasses.replace(gblm.recipe[0], mixture=general),))
    wanda = variant("b", "wanda", {"biomedical": 1.0}, sparsity=0.5)
    assert gradients_needed([gblm, wanda], general) == {("legal", 0)}
    assert gradients_needed([own, wanda], legal) == {("general", 0)}
    assert gradients_needed([wanda], general) == set()


def test_solving_without_the_gradients_names_what_is_missing(tmp_path: Path, store: Store, source: ModelSource) -> None:
    context = prepared(tmp_path / "run", store, source, spied("all"))
    for artifact in list(store.list(KIND)):
        store.discard(KIND, artifact.key)
    with pytest.raises(MissingArtifact, match=KIND):
        compress_block(context, 0, [spied("all")])
