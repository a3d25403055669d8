"""Hessians of mixtures: mixed and normalised by whole corpora, however these landed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosscal.errors import StatisticsError
from crosscal.models import ModelSource
from crosscal.stages.block_problem import SiteStatistics, grouped, needed
from crosscal.stages.compress import RunContext
from crosscal.stages.sample import Sample, over_sums
from crosscal.statistics import InputMoments, Mixture
from crosscal.store import Store
from tests.helpers.tiny_run import collect, part, run_context, sums, tiny_source, variant, windows
from tests.helpers.tiny_variants import MIXED, VARIANTS, calibrated, samples

pytestmark = pytest.mark.usefixtures("quick_disk", "source")


@pytest.fixture(scope="module", params=[torch.float32], ids=str)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("model"), request.param)


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
