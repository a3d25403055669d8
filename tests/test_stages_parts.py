"""Calibration passes in parts: their sum equals that of an undivided pass, for any grouping and order of the parts."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from crosscal.errors import MissingArtifact
from crosscal.models import ModelSource
from crosscal.progress import silent
from crosscal.stages.moments import CachedMoments
from crosscal.stages.parts import KIND, WindowSpan, add_parts, loads, parts_of, read_parts
from crosscal.statistics import EVERY, InputMoments
from crosscal.store import Store
from tests.helpers.tiny_run import LENGTH, collect, dense_cache, keep_windows, tiny_source, windows

ROUNDING = 1e-6
"""Tolerance of float32 sums, relative to the largest that inputs of the same norms could give."""
SITES = 8


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests do not cover power failures."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return tiny_source(tmp_path / "model")


def cache(folder: Path, source: ModelSource) -> CachedMoments:
    return dense_cache(Store(folder), source)


def read(cached: CachedMoments, source: ModelSource, load: list[WindowSpan]) -> int:
    return read_parts(cached, source, load, device="cpu", batch_tokens=64, report=silent).tokens_read


def everything(cached: CachedMoments, source: ModelSource, key: str) -> dict[str, InputMoments]:
    return {
        f"{block}.{site.name}": cached.read(key, block, site)
        for block in range(source.blocks)
        for site in cached.sites(block) or ()
    }


def test_a_set_is_cut_by_its_windows_alone(tmp_path: Path, source: ModelSource) -> None:
    cached = cache(tmp_path / "home", source)
    key = keep_windows(cached.store, windows(7, seed=0))
    parts = parts_of(cached, key, part_tokens=3 * LENGTH + 5)
    assert [(part.start, part.stop, part.tokens) for part in parts] == [(0, 3, 96), (3, 6, 96), (6, 7, 32)]
    assert [part.stop for part in parts_of(cached, key, part_tokens=1)] == [1, 2, 3, 4, 5, 6, 7]
    assert [part.stop for part in parts_of(cached, key, part_tokens=10**9)] == [7]


def test_loads_hold_every_unread_part_once_and_no_more_tokens_than_asked(tmp_path: Path, source: ModelSource) -> None:
    cached = cache(tmp_path / "home", source)
    keys = [keep_windows(cached.store, windows(count, seed=count)) for count in (7, 2, 1, 4)]
    collect(cached, source, [keys[1]])
    found = list(loads(cached, source.blocks, [*keys, keys[0]], 3 * LENGTH))
    assert [[part.tokens // LENGTH for part in load] for load in found] == [[3], [3], [1, 1], [3], [1]]
    assert [part for load in found for part in load] == [
        part for key in (keys[0], keys[2], keys[3]) for part in parts_of(cached, key, 3 * LENGTH)
    ]


def test_parts_add_up_to_the_whole_whatever_the_order_they_are_read_in(tmp_path: Path, source: ModelSource) -> None:
    tokens_SL, sums = windows(23, seed=0), []
    for seed in (0, 1):
        cached = cache(tmp_path / f"home{seed}", source)
        key = keep_windows(cached.store, tokens_SL)
        work = list(loads(cached, source.blocks, [key], 4 * LENGTH))
        random.Random(seed).shuffle(work)
        assert sum(read(cached, source, load) for load in work) == tokens_SL.numel()
        done = add_parts(cached, source.blocks, [key], 4 * LENGTH)
        assert (done.tokens_read, done.hits, done.misses) == (0, 0, SITES)
        sums.append(everything(cached, source, key))
    undivided = cache(tmp_path / "undivided", source)
    collect(undivided, source, [keep_windows(undivided.store, tokens_SL)])
    for name, whole in everything(undivided, source, key).items():
        one, other = sums[0][name], sums[1][name]
        assert one.tokens == whole.tokens
        scale_I = whole.gram_II.diagonal().sqrt()
        assert float(((one.gram_II - whole.gram_II) / torch.outer(scale_I, scale_I)).abs().max()) <= ROUNDING
        for part in ("gram_II", "abs_sum_I", "sum_I"):
            assert torch.equal(getattr(one, part), getattr(other, part)), name
        assert float(((one.abs_sum_I - whole.abs_sum_I) / whole.abs_sum_I).abs().max()) <= ROUNDING


def test_what_was_read_is_not_read_again_and_parts_are_removed_once_added_up(
    tmp_path: Path, source: ModelSource
) -> None:
    cached = cache(tmp_path / "home", source)
    key = keep_windows(cached.store, windows(5, seed=0))
    work = list(loads(cached, source.blocks, [key], 2 * LENGTH))
    assert read(cached, source, work[0]) == 2 * LENGTH
    with pytest.raises(MissingArtifact):  # a missing part is never left out of the sum
        add_parts(cached, source.blocks, [key], 2 * LENGTH)
    assert [read(cached, source, load) for load in work] == [0, 2 * LENGTH, LENGTH]
    assert len(list(cached.store.list(KIND))) == 3 * SITES * len({which.stored_in for which in EVERY})
    add_parts(cached, source.blocks, [key], 2 * LENGTH)
    assert list(cached.store.list(KIND)) == []
    assert list(loads(cached, source.blocks, [key], 2 * LENGTH)) == []
    again = add_parts(cached, source.blocks, [key], 2 * LENGTH)
    assert (again.hits, again.misses) == (SITES, 0)


def test_a_sum_that_another_run_finished_first_is_found(
    tmp_path: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run publishes the sums and removes the parts between this run's check and its read."""
    cached = cache(tmp_path / "home", source)
    key = keep_windows(cached.store, windows(4, seed=0))
    for load in loads(cached, source.blocks, [key], LENGTH):
        read(cached, source, load)
    look, looks = CachedMoments.has_site, 0

    def late(self: CachedMoments, *place) -> bool:
        nonlocal looks
        found = look(self, *place)
        if self.kind != KIND and place[0] == key:
            looks += 1
            if looks == 3:
                monkeypatch.setattr(CachedMoments, "has_site", look)
                add_parts(self, source.blocks, [key], LENGTH)
        return found

    monkeypatch.setattr(CachedMoments, "has_site", late)
    add_parts(cached, source.blocks, [key], LENGTH)
    assert looks == 3
    assert len(everything(cached, source, key)) == SITES
