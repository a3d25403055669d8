"""Moments of a growing corpus: no token is run twice, and a folded sum equals the sum of its sets."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from crosscal.calibration import PoolPart
from crosscal.calibration.sets import windows_by_key
from crosscal.corpora import load_corpus
from crosscal.models import ModelSource
from crosscal.stages.folding import fold, sets_to_read, unread_tokens
from crosscal.stages.moments import CachedMoments
from crosscal.stages.sample import SplitSets, sample_documents
from crosscal.stages.solve import solve_block
from crosscal.statistics import EVERY, VECTORS, InputMoments
from crosscal.store import Store
from crosscal.store.local_home import LocalHome
from tests.helpers.growing_corpus import ALL, drawn, grow, land, texts
from tests.helpers.tiny_run import collect, dense_cache, keep_windows, run_context, variant
from tests.helpers.tiny_text import tiny_llama

pytestmark = pytest.mark.usefixtures("quick_disk")
ROUNDOFF_F32 = 2e-6
SPLITS = ("calibration", "held_out")


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    tiny_llama(tmp_path / "model")
    return ModelSource.open(tmp_path / "model")


def summed(cached: CachedMoments, source: ModelSource, keys: Sequence[tuple[str, float]]) -> list[InputMoments]:
    """Return the weighted sum of the given sets at every site."""
    return [
        functools.reduce(operator.add, (cached.read(key, block, site).weighted(weight) for key, weight in keys))
        for block in range(source.blocks)
        for site in cached.sites(block) or ()
    ]


def assert_close(one: Sequence[InputMoments], other: Sequence[InputMoments]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.tokens == b.tokens
        assert a.mass == pytest.approx(b.mass, rel=1e-12)
        scale_I = b.gram_II.diagonal().sqrt()
        assert float(((a.gram_II - b.gram_II) / torch.outer(scale_I, scale_I)).abs().max()) <= ROUNDOFF_F32


def read_anew(folder: Path, store: Store, source: ModelSource, parts: Sequence[PoolPart]) -> list[InputMoments]:
    """Return the weighted sum over all sets, each collected separately into an empty store."""
    anew = dense_cache(Store(folder), source)
    keys = [keep_windows(anew.store, windows_by_key(store, part.key)) for part in parts]
    collect(anew, source, keys)
    return summed(anew, source, [(key, part.weight) for key, part in zip(keys, parts, strict=True)])


@pytest.mark.parametrize("windows", [10_000, 12])
def test_what_is_folded_is_the_sum_of_its_sets(tmp_path: Path, source: ModelSource, windows: int) -> None:
    draw = dataclasses.replace(ALL, windows=windows, held_out_windows=windows)
    store, samples, read = grow(tmp_path, source, draw, 9)
    cached, newest = dense_cache(store, source), samples[-1]
    weights = {part.weight for part in drawn(store, newest.calibration)}
    assert (weights == {1.0}) == (windows == 10_000)
    assert len(newest.calibration.parts) == draw.parts_kept_apart + 1
    for sums, name in ((newest.calibration, "calibration"), (newest.held_out, "held-out")):
        found = summed(cached, source, [(part.key, part.weight) for part in sums.parts])
        assert_close(found, read_anew(tmp_path / name, store, source, drawn(store, sums)))
    assert sum(read) == newest.tokens, "nothing is read twice"


def test_number_of_stored_moments_stays_bounded(tmp_path: Path, source: ModelSource) -> None:
    """Per split, those that a solve and the previous sample need; the previous sample can still be solved."""
    store, samples, _ = grow(tmp_path, source, ALL, 12)
    cached, sites = dense_cache(store, source), 4 * source.blocks
    of_a_site = len({which.stored_in for which in EVERY})
    assert len(list(store.keys("moments"))) <= 2 * of_a_site * sites * (ALL.parts_kept_apart + 3)
    for sample in samples[-2:]:
        assert all(cached.has(key, block) for key in sample.sets for block in range(source.blocks))
    assert not cached.has(samples[3].calibration.apart[-1].key, 0)


def test_what_a_later_plan_misses_of_a_folded_sum_is_read_again(tmp_path: Path, source: ModelSource) -> None:
    """Vector sums are folded as a corpus grows; Σ x xᵀ over the folded sets is computed when a plan first needs it."""
    store, samples, read = grow(tmp_path, source, ALL, 6, wanted=frozenset(VECTORS))
    newest, small = samples[-1], dataclasses.replace(dense_cache(store, source), wanted=frozenset(VECTORS))
    assert sum(read) == newest.tokens, "nothing is read twice"
    keys = [(part.key, part.weight) for part in newest.calibration.parts]
    before = summed(small, source, keys)
    every = dense_cache(store, source)
    assert sum(unread_tokens(every, source.blocks, sums) for sums in (newest.calibration, newest.held_out)) == sum(read)
    assert collect(every, source, sets_to_read(every, source.blocks, newest)).tokens_read == sum(read)
    fold(every, source.blocks, newest)
    found = summed(every, source, keys)
    assert_close(found, read_anew(tmp_path / "anew", store, source, drawn(store, newest.calibration)))
    for one, other in zip(found, before, strict=True):
        assert all(torch.equal(one[which], other[which]) for which in VECTORS), "what was there stays"
    assert not collect(every, source, sets_to_read(every, source.blocks, newest)).tokens_read


@pytest.mark.slow
def test_what_was_folded_is_read_again_by_who_needs_it(tmp_path: Path, source: ModelSource) -> None:
    """An older sample, more sets kept apart, or another precision: all their windows are run again, in few sets."""
    store, samples, _ = grow(tmp_path, source, ALL, 8)
    corpus = load_corpus(store, "legal")
    wider = sample_documents(store, corpus, source, dataclasses.replace(ALL, parts_kept_apart=4))
    assert wider.keys == samples[-1].keys, "the same text, however it is kept"
    for sample, cached in (
        (samples[4], dense_cache(store, source)),
        (wider, dense_cache(store, source)),
        (samples[-1], dense_cache(store, source, "float64")),
    ):
        sets = sets_to_read(cached, source.blocks, sample)
        assert len(sets) <= 2 * (len(sample.calibration.parts) + 1)
        collect(cached, source, sets)
        fold(cached, source.blocks, sample)
        found = summed(cached, source, [(part.key, part.weight) for part in sample.calibration.parts])
        folder = tmp_path / f"{cached.dtype}-{sample.keys[0][:8]}-{len(sample.sets)}"
        anew = read_anew(folder, store, source, drawn(store, sample.calibration))
        assert_close([to_float32(each) for each in found], anew)


def test_an_interrupted_fold_goes_on_and_reads_nothing_again(
    tmp_path: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = grow(tmp_path, source, ALL, 4)
    cached = dense_cache(store, source)
    sample = sample_documents(store, land(store, tmp_path / "more", [texts(9, 50, 2)]), source, ALL)
    collect(cached, source, sets_to_read(cached, source.blocks, sample))
    publish, left = CachedMoments.publish_site, [3]

    def dying(self: CachedMoments, *args) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        publish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CachedMoments, "publish_site", dying)
        with pytest.raises(KeyboardInterrupt):
            fold(cached, source.blocks, sample)
    assert collect(cached, source, sets_to_read(cached, source.blocks, sample)).tokens_read == 0
    fold(cached, source.blocks, sample)
    found = summed(cached, source, [(part.key, part.weight) for part in sample.calibration.parts])
    assert_close(found, read_anew(tmp_path / "anew", store, source, drawn(store, sample.calibration)))


def test_what_another_process_uses_stays(tmp_path: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalHome, "in_use_since", lambda self: 0.0)  # of a process older than any use
    store, samples, read = grow(tmp_path, source, ALL, 6)
    cached = dense_cache(store, source)
    for sample in samples:
        assert all(cached.has(key, block) for key in sample.sets for block in range(source.blocks))
    assert sum(read) == samples[-1].tokens


@pytest.mark.parametrize("windows", [10_000, 12])
def test_a_variant_from_folded_moments_is_that_from_all_sets(tmp_path: Path, source: ModelSource, windows: int) -> None:
    draw = dataclasses.replace(ALL, windows=windows)
    store, samples, _ = grow(tmp_path, source, draw, 6)
    asked = [
        variant("sparse", "sparsegpt", {"legal": 1.0}, sparsity=0.5, damping=0.01),
        variant("wanda", "wanda", {"legal": 1.0}, sparsity=0.5),
    ]
    other = dense_cache(Store(tmp_path / "other"), source)
    plain = dataclasses.replace(
        samples[-1], **{split: kept_apart(other.store, store, getattr(samples[-1], split)) for split in SPLITS}
    )
    collect(other, source, plain.sets)
    contexts = (
        run_context(tmp_path / "a", store, source, samples[-1]),
        run_context(tmp_path / "b", other.store, source, plain),
    )
    for block in range(source.blocks):
        one, two = (solve_block(context.problem(block, context.cached), asked) for context in contexts)
        for each in asked:
            for a, b in zip(one[each.name].rows, two[each.name].rows, strict=True):
                assert a.relative_loss == pytest.approx(b.relative_loss, rel=1e-3)
                assert a.heldout_relative_loss == pytest.approx(b.heldout_relative_loss, rel=1e-3)
                assert a.tokens == b.tokens


def kept_apart(target: Store, store: Store, sums: SplitSets) -> SplitSets:
    """Copy the sets to another store, none of them folded."""
    parts = drawn(store, sums)
    keys = [keep_windows(target, windows_by_key(store, part.key)) for part in parts]
    return SplitSets(tuple(dataclasses.replace(part, key=key) for part, key in zip(parts, keys, strict=True)))


def to_float32(moments: InputMoments) -> InputMoments:
    return dataclasses.replace(moments, sums={which: sum_.float() for which, sum_ in moments.sums.items()})
