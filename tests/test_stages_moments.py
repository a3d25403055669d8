"""Calibration passes: cached moments equal computed ones, and no set is run twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from crosscal.models import ModelSource, walk
from crosscal.stages.moments import CachedMoments
from crosscal.statistics import InputMoments
from crosscal.store import Store
from tests.helpers.tiny_run import collect, dense_cache, keep_windows, tiny_source, windows

ROUNDOFF_F32 = 2e-6


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests do not cover power failures."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return tiny_source(tmp_path / "model")


def everything(cached: CachedMoments, source: ModelSource, key: str) -> dict[str, InputMoments]:
    return {
        f"{block}.{site.name}": cached.read(key, block, site)
        for block in range(source.blocks)
        for site in cached.sites(block) or ()
    }


def assert_equal(one: dict[str, InputMoments], other: dict[str, InputMoments]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].tokens == other[name].tokens
        for part in ("gram_II", "abs_sum_I", "sum_I"):
            assert torch.equal(getattr(one[name], part), getattr(other[name], part)), name


def test_what_is_read_back_is_what_a_walk_gives(store: Store, source: ModelSource) -> None:
    tokens_SL, cached = windows(5, seed=0), dense_cache(store, source)
    key = keep_windows(store, tokens_SL)
    done = collect(cached, source, [key])
    assert (done.tokens_read, done.hits, done.misses) == (tokens_SL.numel(), 0, 8)
    seen: dict[str, InputMoments] = {}

    def on_block(found) -> None:
        seen.update({f"{found.block}.{name}": moments for name, moments in found.moments[key].items()})

    walk(source, {key: tokens_SL}, on_block=on_block, batch_tokens=64, dtype=torch.float32)
    assert_equal(everything(cached, source, key), seen)


def test_nothing_is_read_twice_and_a_new_set_costs_its_own_tokens(store: Store, source: ModelSource) -> None:
    old, landed = windows(4, seed=0), windows(3, seed=1)
    first, second = keep_windows(store, old), keep_windows(store, landed)
    collect(dense_cache(store, source), source, [first])
    before = everything(dense_cache(store, source), source, first)
    cached = dense_cache(Store(store.location), source)
    again = collect(cached, source, [first])
    assert (again.tokens_read, again.hits, again.misses) == (0, 8, 0)
    more = collect(cached, source, [first, second, second])
    assert (more.tokens_read, more.hits, more.misses) == (landed.numel(), 8, 8)
    assert_equal(everything(cached, source, first), before)


def test_moments_of_two_shards_add_up_to_those_of_both(store: Store, source: ModelSource) -> None:
    tokens_SL, cached = windows(7, seed=0), dense_cache(store, source)
    parts = [keep_windows(store, tokens_SL[:3]), keep_windows(store, tokens_SL[3:])]
    whole = keep_windows(store, tokens_SL)
    collect(cached, source, [*parts, whole])
    one, other, both = (everything(cached, source, key) for key in (*parts, whole))
    for name, moments in both.items():
        added = one[name] + other[name]
        assert added.tokens == moments.tokens == tokens_SL.numel()
        scale = float(moments.gram_II.abs().max())
        torch.testing.assert_close(added.gram_II, moments.gram_II, rtol=0, atol=ROUNDOFF_F32 * scale)


@pytest.mark.parametrize("fatal_publish", [2, 9, 11, 17])  # per block: 4 sites x 2 artifacts, then its list of sites
def test_an_interrupted_reading_goes_on_and_equals_an_undisturbed_one(
    tmp_path: Path, store: Store, source: ModelSource, fatal_publish: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_SL = windows(4, seed=0)
    key = keep_windows(store, tokens_SL)
    publish, calls = Store.publish, 0

    def die(self: Store, kind: str, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == fatal_publish:
            raise KeyboardInterrupt
        return publish(self, kind, *args, **kwargs)

    monkeypatch.setattr(Store, "publish", die)
    with pytest.raises(KeyboardInterrupt):
        collect(dense_cache(store, source), source, [key])
    monkeypatch.undo()
    resumed = collect(dense_cache(store, source), source, [key])
    assert resumed.hits == (4 if fatal_publish > 9 else 0)
    assert resumed.hits + resumed.misses <= 8
    assert collect(dense_cache(store, source), source, [key]).hits == 8

    other = Store(tmp_path / "undisturbed")
    keep_windows(other, tokens_SL)
    collect(dense_cache(other, source), source, [key])
    assert_equal(
        everything(dense_cache(store, source), source, key), everything(dense_cache(other, source), source, key)
    )


def test_models_upstreams_and_precisions_do_not_share_moments(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    key = keep_windows(store, windows(2, seed=0))
    cached = dense_cache(store, source)
    collect(cached, source, [key])
    assert cached.has(key, 0)
    assert not dense_cache(store, source, "float64").has(key, 0)
    assert not CachedMoments(store, source.digest, "sequential-x", "float32").has(key, 0)
    assert not CachedMoments(store, "another model", "dense", "float32").has(key, 0)
