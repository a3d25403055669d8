"""In a run, steps receive exactly the statistics that they declare, mixed like H."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from crosscal.compressors import COMPRESSORS, Site, Statistic
from crosscal.errors import StatisticsError
from crosscal.models import ModelSource
from crosscal.progress import silent
from crosscal.stages.compress import RunContext, compress_block, compress_sequential
from crosscal.statistics import EVERY
from crosscal.store import Store
from crosscal.variants import Variant
from tests.helpers.spies import MIXED, OWN, samples, spied
from tests.helpers.tiny_run import collect, run_context, tiny_source

Seen = dict[str, dict[Statistic, Tensor]]
"""Name of a site's first layer -> the statistics that a step received there."""
SEEN: dict[str, Seen] = {}


@dataclass(frozen=True)
class Spy:
    """Records the statistics that it declares and changes nothing."""

    name: str

    kind: ClassVar = "prune"
    needs: ClassVar = EVERY
    version: ClassVar = 1

    def __call__(self, site: Site) -> Site:
        block_and_site = site.layers[0].name
        SEEN.setdefault(self.name, {})[block_and_site] = {w: site.statistics[w].clone() for w in self.needs}
        return site


@dataclass(frozen=True)
class Means(Spy):
    needs: ClassVar = frozenset({Statistic.ABS_SUM, Statistic.SUM})


@dataclass(frozen=True)
class Prying(Means):
    """Requests a statistic that only another step of its recipe declares."""

    def __call__(self, site: Site) -> Site:
        assert site.statistics[Statistic.SUM].ndim == 1
        assert site.statistics.hessian_II.ndim == 2
        return site


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    SEEN.clear()
    for name, step in (("spy", Spy), ("means", Means), ("prying", Prying)):
        monkeypatch.setitem(COMPRESSORS, name, step)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("model"))


def expected(context: RunContext, mixture: Mapping[str, float], *, normalised: bool) -> Seen:
    """Float64 means computed from the sums of every set: per corpus, then mixed over corpora."""
    found: Seen = {}
    for block in range(context.source.blocks):
        for site in context.cached.sites(block) or ():
            means: dict[str, dict[Statistic, Tensor]] = {}
            for corpus in mixture:
                parts = context.samples[corpus, 0].calibration.parts
                read = [(part.weight, context.cached.read(part.key, block, site)) for part in parts]
                mass = sum(weight * moments.tokens for weight, moments in read)
                total = {w: torch.stack([weight * m[w].double() for weight, m in read]).sum(0) for w in EVERY}
                means[corpus] = {which: each / mass for which, each in total.items()}
            trace = {corpus: float(of[Statistic.GRAM].trace()) for corpus, of in means.items()}
            mean_trace = sum(weight * trace[corpus] for corpus, weight in mixture.items())
            scale = {corpus: mean_trace / trace[corpus] if normalised else 1.0 for corpus in mixture}
            power = {Statistic.GRAM: 1, Statistic.SQUARE_SUM: 1, Statistic.ABS_SUM: 0.5, Statistic.SUM: 0.5}
            found[f"{context.source.block_name(block)}.{site.matrices[0].name}"] = {
                which: torch.stack([w * scale[c] ** power[which] * means[c][which] for c, w in mixture.items()]).sum(0)
                for which in EVERY
            }
    return found


def assert_close(seen: Seen, wanted: Seen) -> None:
    assert seen.keys() == wanted.keys()
    for name, means in seen.items():
        for which, mean in means.items():
            bound = 1e-5 * float(wanted[name][which].abs().max())
            torch.testing.assert_close(mean.double(), wanted[name][which], rtol=0, atol=bound)


def solved(folder: Path, store: Store, source: ModelSource, *asked: Variant) -> RunContext:
    context = run_context(folder, store, source, *samples(store))
    collect(context.cached, source, [key for each in context.samples.values() for key in each.sets])
    for block in range(source.blocks):
        compress_block(context, block, asked)
    return context


@pytest.mark.parametrize("normalised", [False, True])
def test_what_steps_declare_is_mixed_as_h_is(
    tmp_path: Path, store: Store, source: ModelSource, normalised: bool
) -> None:
    context = solved(tmp_path / "run", store, source, spied("all", normalised=normalised))
    assert_close(SEEN["all"], expected(context, MIXED.as_dict(), normalised=normalised))
    assert_close(SEEN["all-own"], expected(context, OWN.as_dict(), normalised=normalised))


def test_a_sequential_walk_shows_the_same(tmp_path: Path, store: Store, source: ModelSource) -> None:
    """The spies change nothing, so sequential inputs equal dense ones."""
    context = solved(tmp_path / "run", store, source, spied("dense"))
    compress_sequential(context, spied("walk", upstream="sequential"), batch_tokens=64, report=silent)
    assert_close(SEEN["walk"], expected(context, MIXED.as_dict(), normalised=False))
    assert_close(SEEN["walk-own"], expected(context, OWN.as_dict(), normalised=False))


def test_a_step_sees_what_it_declares_and_no_more(tmp_path: Path, store: Store, source: ModelSource) -> None:
    solved(tmp_path / "run", store, source, spied("few", "means"))
    assert all(set(means) == {Statistic.ABS_SUM, Statistic.SUM} for means in SEEN["few"].values())
    with pytest.raises(StatisticsError, match="does not declare"):
        solved(tmp_path / "poisoned", store, source, spied("more", "prying"))
