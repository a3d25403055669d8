"""A run computes only the sums that its plan's methods need; a later plan computes only those that it still lacks.

Σ x xᵀ and the vector sums are separate artifacts. Artifacts of earlier versions, with all sums in one, are still read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from crosscal.models import ModelSource
from crosscal.progress import silent
from crosscal.report.rows import LayerRow, read_rows
from crosscal.stages.block_problem import statistics_needed
from crosscal.stages.compress import RunContext, compress_block, compress_sequential, layer_rows
from crosscal.stages.moments import CachedMoments
from crosscal.stages.parts import add_parts, parts_of, read_parts
from crosscal.statistics import EVERY, VECTORS, Statistic
from crosscal.store import Store
from crosscal.store.moments import write_moments
from crosscal.variants import Variant
from tests.helpers.tiny_place import Place, crosscal, make_place
from tests.helpers.tiny_run import (
    LENGTH,
    collect,
    dense_cache,
    keep_windows,
    run_context,
    sample,
    tiny_source,
    variant,
    windows,
)

MIXED = {"general": 0.75, "legal": 0.25}
WANDA = variant("pruned", "wanda", MIXED, sparsity=0.5)
NORMALISED = variant("normalised", "wanda", MIXED, sparsity=0.5, trace_normalised=True)
SPARSEGPT = variant("sparse", "sparsegpt", MIXED, sparsity=0.5, damping=0.01)
MAGNITUDE = variant("magnitude", "magnitude", None, sparsity=0.5)
SITES = 8
SMALL = frozenset(VECTORS)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests do not cover power failures."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("model"))


def wanting(store: Store, source: ModelSource, wanted: frozenset[Statistic]) -> CachedMoments:
    return dataclasses.replace(dense_cache(store, source), wanted=wanted)


def held(store: Store, kind: str = "moments") -> dict[str, list[str]]:
    """Return the key of every artifact -> the names of its sums."""
    return {artifact.key: artifact.provenance["sums"] for artifact in store.list(kind)}


def counted(store: Store) -> dict[str, int]:
    """Return the numbers of artifacts with a matrix and with vectors."""
    sums = list(held(store).values())
    return {"gram": sum("gram" in each for each in sums), "vectors": sum("sum" in each for each in sums)}


def bits(cached: CachedMoments, source: ModelSource, key: str) -> list[bytes]:
    read = [cached.read(key, b, site) for b in range(source.blocks) for site in cached.sites(b) or ()]
    return [sum_.numpy().tobytes() for moments in read for sum_ in moments.sums.values()]


def test_what_a_plan_needs() -> None:
    assert statistics_needed([WANDA, MAGNITUDE, NORMALISED]) == SMALL
    assert statistics_needed([MAGNITUDE, SPARSEGPT]) == EVERY


def test_only_what_is_wanted_is_summed_and_only_what_is_missing_is_read(store: Store, source: ModelSource) -> None:
    tokens_SL = windows(5, seed=0)
    key = keep_windows(store, tokens_SL)
    small, every = wanting(store, source, SMALL), wanting(store, source, EVERY)
    first = collect(small, source, [key])
    assert (first.tokens_read, first.hits, first.misses) == (tokens_SL.numel(), 0, SITES)
    assert counted(store) == {"gram": 0, "vectors": SITES}
    before, kept = bits(small, source, key), set(held(store))
    assert not every.has(key, 0)
    more = collect(every, source, [key])
    assert (more.tokens_read, more.misses) == (tokens_SL.numel(), SITES)
    assert counted(store) == {"gram": SITES, "vectors": SITES}
    assert kept < set(held(store)), "the vectors are the artifacts that they were"
    assert bits(small, source, key) == before
    for cached in (small, every):
        again = collect(cached, source, [key])
        assert (again.tokens_read, again.hits, again.misses) == (0, SITES, 0)
    assert all(problem is None for _, _, problem in store.verify())


def test_sums_read_in_two_steps_are_those_read_at_once(tmp_path: Path, store: Store, source: ModelSource) -> None:
    key, other = keep_windows(store, windows(5, seed=0)), Store(tmp_path / "other")
    keep_windows(other, windows(5, seed=0))
    for wanted in (SMALL, EVERY):
        collect(wanting(store, source, wanted), source, [key])
    collect(wanting(other, source, EVERY), source, [key])
    assert bits(wanting(store, source, EVERY), source, key) == bits(wanting(other, source, EVERY), source, key)


# --- stores of earlier versions --------------------------------------------------------------------------------------


def as_stored_before(store: Store, cached: CachedMoments, source: ModelSource, keys: list[str]) -> None:
    """Replace the artifacts by those of earlier versions: a matrix and two vectors in one, the vectors without a
    header."""
    for key in keys:
        for block in range(source.blocks):
            for site in cached.sites(block) or ():
                moments = cached.read(key, block, site)
                cached.discard(key, block, site)
                with store.publish("moments", cached._key(key, block, site), {"sums": ["gram", "sum"]}) as folder:
                    write_moments(folder, moments.only({Statistic.GRAM, Statistic.ABS_SUM, Statistic.SUM}))
                    with pa.memory_map(str(folder / "vectors.arrow")) as file:
                        table = pa.ipc.open_file(file).read_all().replace_schema_metadata(None)
                    (folder / "vectors.arrow").unlink()
                    with pa.ipc.new_file(str(folder / "vectors.arrow"), table.schema) as writer:
                        writer.write_table(table)


def test_a_store_of_an_earlier_version_is_read_as_before(store: Store, source: ModelSource) -> None:
    keys = [keep_windows(store, windows(5, seed=0)), keep_windows(store, windows(3, seed=1))]
    cached = wanting(store, source, EVERY)
    collect(cached, source, keys)
    now = [cached.read(key, 0, site) for key in keys for site in cached.sites(0) or ()]
    as_stored_before(store, cached, source, keys)
    assert len(held(store)) == 2 * SITES
    store = Store(store.location)
    for wanted in (EVERY, SMALL, frozenset({Statistic.SUM})):
        cached = wanting(store, source, wanted)
        done = collect(cached, source, keys)
        assert (done.tokens_read, done.hits, done.misses) == (0, 2 * SITES, 0)
        found = [cached.read(key, 0, site) for key in keys for site in cached.sites(0) or ()]
        for old, new in zip(found, now, strict=True):
            assert set(old.sums) == wanted
            assert old.tokens == new.tokens
            for which in wanted - {Statistic.SQUARE_SUM}:
                assert torch.equal(old[which], new[which])
            if Statistic.SQUARE_SUM in wanted:  # not stored: H's diagonal, which is rounded differently
                torch.testing.assert_close(old[Statistic.SQUARE_SUM], new[Statistic.SQUARE_SUM], rtol=1e-5, atol=0)
    assert all(problem is None for _, _, problem in store.verify())
    cached = wanting(store, source, SMALL)
    for site in cached.sites(0) or ():
        cached.discard(keys[0], 0, site)
        assert not cached.is_kept(keys[0], 0, site)


# --- in parts --------------------------------------------------------------------------------------------------------


def test_parts_hold_what_is_wanted_and_leave_nothing(tmp_path: Path, store: Store, source: ModelSource) -> None:
    tokens_SL = windows(5, seed=0)
    key, whole = keep_windows(store, tokens_SL), Store(tmp_path / "whole")
    keep_windows(whole, tokens_SL)
    for wanted in (SMALL, EVERY):
        cached = wanting(store, source, wanted)
        for part in parts_of(cached, key, 2 * LENGTH):
            read_parts(cached, source, [part], device="cpu", batch_tokens=64, report=silent)
        assert {"gram" in sums for sums in held(store, "moment-parts").values()} == (
            {False} if wanted == SMALL else {False, True}
        )
        done = add_parts(cached, source.blocks, [key], 2 * LENGTH)
        assert (done.hits, done.misses) == (0, SITES)
        assert not held(store, "moment-parts")
    assert counted(store) == {"gram": SITES, "vectors": SITES}
    collect(wanting(whole, source, EVERY), source, [key])
    for block in range(source.blocks):
        for site in wanting(store, source, EVERY).sites(block) or ():
            one, other = (wanting(each, source, EVERY).read(key, block, site) for each in (store, whole))
            for which in EVERY:
                bound = 1e-5 * float(other[which].abs().max())
                torch.testing.assert_close(one[which], other[which], rtol=0, atol=bound)


# --- solving ---------------------------------------------------------------------------------------------------------


def solved(folder: Path, store: Store, source: ModelSource, *asked: Variant) -> RunContext:
    """Collect moments and solve, as a run over these variants does."""
    parts = [sample(store, "general", windows(6, seed=0)), sample(store, "legal", windows(5, seed=1))]
    context = run_context(folder, store, source, *parts)
    context = dataclasses.replace(context, cached=wanting(store, source, statistics_needed(asked)))
    dense = [each for each in asked if each.upstream == "dense"]
    if dense:
        collect(context.cached, source, [key for each in parts for key in each.sets])
    for block in range(source.blocks):
        compress_block(context, block, dense)
    for each in asked:
        if each.upstream == "sequential":
            compress_sequential(context, each, batch_tokens=64, report=silent)
    return context


def shards(context: RunContext, each: Variant) -> dict[str, bytes]:
    folder = context.folder / "models" / each.name
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("upstream", ["dense", "sequential"])
def test_weights_do_not_depend_on_what_else_is_summed(
    tmp_path: Path, store: Store, source: ModelSource, upstream: str
) -> None:
    """Wanda's weights are bit-identical without any H and, next to SparseGPT, with one."""
    asked = [dataclasses.replace(each, upstream=upstream) for each in (WANDA, NORMALISED)]
    alone = solved(tmp_path / "alone", store, source, *asked, MAGNITUDE)
    other = Store(tmp_path / "other")
    beside = solved(tmp_path / "beside", other, source, *asked, MAGNITUDE, SPARSEGPT)
    for each in (*asked, MAGNITUDE):
        assert shards(alone, each) == shards(beside, each)
        assert len(shards(alone, each)) == source.blocks
    without, with_h = (layer_rows(context, [*asked, MAGNITUDE]) for context in (alone, beside))
    assert all(row.loss is None is row.relative_loss is row.heldout_relative_loss for row in without)
    assert all(row.loss is not None and row.heldout_relative_loss is not None for row in with_h)
    same = [
        field.name for field in dataclasses.fields(LayerRow) if "loss" not in field.name and field.name != "seconds"
    ]
    assert [[getattr(row, name) for name in same] for row in without] == [
        [getattr(row, name) for name in same] for row in with_h
    ]
    assert counted(store)["gram"] == 0


# --- a whole run -----------------------------------------------------------------------------------------------------


def rows(record: Mapping[str, Any]) -> list[LayerRow]:
    return read_rows(Path(record["run_dir"]) / "layers.jsonl", LayerRow)


def check(place: Place) -> dict[str, Any]:
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json")
    return json.loads(done.out)


def test_a_run_without_h_says_so_and_a_later_one_reads_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    wanda = {"method": "wanda", "sparsity": [0.5, 0.6], "domain": "legal", "alpha": [0, 0.5]}
    h = {"method": "sparsegpt", "sparsity": 0.5, "domain": "legal", "alpha": 0.5}
    place.write_plan(compress=[wanda])
    small = check(place)
    assert small["sums"] == sorted(SMALL)
    first = place.run()
    assert any("losses were not measured" in note for note in first["notes"])
    assert all(row.loss is None for row in rows(first))
    assert counted(Store(place.home))["gram"] == 0
    report = (place.run_dir / "report.html").read_text()
    assert "losses were not measured" in report
    assert "relative loss" not in report
    shown = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert shown.code == 0, shown.err
    assert "wanda-60" in shown.out

    place.write_plan(compress=[wanda, h])
    every = check(place)
    assert every["sums"] == sorted(EVERY)
    assert every["calibration_tokens_to_read"] == first["calibration_tokens_read"] > 0
    assert every["disk"]["store_bytes"] > small["disk"]["store_bytes"]
    second = place.run("--out", str(tmp_path / "more"))
    assert second["calibration_tokens_read"] == first["calibration_tokens_read"]
    assert all(row.loss is not None for row in rows(second)), "Wanda's too, although it was made before"
    assert check(place)["calibration_tokens_to_read"] == 0
    third = place.run("--out", str(tmp_path / "again"))
    assert third["calibration_tokens_read"] == 0
