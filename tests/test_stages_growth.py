"""Growing corpora: no token is lost or run twice, and a folded sum equals the sum of its sets."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from crosscal.calibration import Pool, PoolPart, WindowRequest
from crosscal.calibration.pool import RECENT, all_parts, draw_pool, most_windows, read_pool
from crosscal.calibration.sets import windows_by_key
from crosscal.corpora import Corpus, documents, ingest, load_corpus
from crosscal.models import ModelSource
from crosscal.stages.folding import fold, sets_to_read, unread_tokens
from crosscal.stages.moments import CachedMoments
from crosscal.stages.sample import Draw, Sample, SplitSets, sample_documents
from crosscal.stages.solve import solve_block
from crosscal.statistics import EVERY, VECTORS, InputMoments, Statistic
from crosscal.store import Store
from crosscal.store.local_home import LocalHome
from tests.helpers.tiny_run import collect, dense_cache, keep_windows, run_context, variant
from tests.helpers.tiny_text import SENTENCES, tiny_llama, tiny_tokenizer

LENGTH = 32
ALL = Draw(windows=10_000, length=LENGTH, seed=0, held_out_windows=10_000, parts_kept_apart=2)
ROUNDOFF_F32 = 2e-6
SPLITS = ("calibration", "held_out")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests do not cover power failures."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    tiny_llama(tmp_path / "model")
    return ModelSource.open(tmp_path / "model")


def texts(count: int, seed: int = 0, sentences: int = 1) -> list[str]:
    chance = random.Random(seed)
    return [f"{seed} {number}: " + " ".join(chance.choices(SENTENCES, k=sentences)) for number in range(count)]


def land(store: Store, folder: Path, files: Sequence[Sequence[str]], name: str = "legal") -> Corpus:
    """Ingest each file separately."""
    folder.mkdir(exist_ok=True)
    for number, lines in enumerate(files):
        file = folder / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        ingest(store, name, [str(file)])
    return load_corpus(store, name)


def in_files(lines: Sequence[str], size: int) -> list[Sequence[str]]:
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def pool_of(
    store: Store, corpus: Corpus, windows: int, split: str = "train", seed: int = 0, begin: bool = False
) -> Pool:
    """With `begin` every window begins with `<s>`, which is not counted as a token of the corpus."""
    request = WindowRequest(windows, LENGTH, seed, split, begin_token=begin)
    return draw_pool(store, corpus.shards, tiny_tokenizer(), "0" * 64, request)


def tokens_of(store: Store, corpus: Corpus, split: str = "train") -> int:
    found, tokenizer = (text for shard in corpus.shards for text in documents(store, shard, split)), tiny_tokenizer()
    return sum(len(tokenizer(text)["input_ids"]) + 1 for text in found)


# --- drawing windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("size", [1, 6, 50, 150])
def test_every_token_enters_or_waits_however_it_lands(tmp_path: Path, size: int, split: str) -> None:
    store = Store(tmp_path / "home")
    corpus = land(store, tmp_path / "files", in_files(texts(150), size))
    pool = pool_of(store, corpus, 10_000, split)
    drawn = torch.cat([windows_by_key(store, part.key) for part in all_parts(store, pool)])
    assert drawn.numel() == pool.windows * LENGTH == pool.tokens_used
    assert len(pool.rest) < LENGTH
    assert pool.tokens_used + len(pool.rest) == tokens_of(store, corpus, split)
    assert all(part.weight == 1 for part in pool.parts)
    everything = sorted(drawn.flatten().tolist() + list(pool.rest))
    found, tokenizer = (text for shard in corpus.shards for text in documents(store, shard, split)), tiny_tokenizer()
    assert everything == sorted(token for text in found for token in (*tokenizer(text)["input_ids"], 1))


@pytest.mark.parametrize("size", [1, 6, 50, 150])
def test_every_token_enters_once_where_windows_begin_with_one_of_their_own(tmp_path: Path, size: int) -> None:
    store = Store(tmp_path / "home")
    corpus = land(store, tmp_path / "files", in_files(texts(150), size))
    pool = pool_of(store, corpus, 10_000, begin=True)
    drawn = torch.cat([windows_by_key(store, part.key) for part in all_parts(store, pool)])
    assert (drawn[:, 0] == 0).all()
    assert (drawn[:, 1] != 0).all()
    assert pool.tokens_used + len(pool.rest) == tokens_of(store, corpus)
    everything = sorted(token for token in drawn.flatten().tolist() + list(pool.rest) if token)
    found, tokenizer = (text for shard in corpus.shards for text in documents(store, shard, "train")), tiny_tokenizer()
    assert everything == sorted(token for text in found for token in (*tokenizer(text)["input_ids"][1:], 1))


def test_the_same_documents_have_the_same_share_in_one_file_or_in_many_in_any_order(tmp_path: Path) -> None:
    lines, counts, shares = texts(150), set(), []
    for number, (size, seed) in enumerate([(150, None), (6, None), (1, None), (1, 1), (6, 2)]):
        ordered = list(lines)
        if seed is not None:
            random.Random(seed).shuffle(ordered)
        store = Store(tmp_path / f"home{number}")
        corpus = land(store, tmp_path / f"files{number}", in_files(ordered, size))
        counts.add(tuple(corpus.documents(split) for split in ("train", "validation", "test")))
        pool = pool_of(store, corpus, 10_000)
        shares.append(pool.windows * LENGTH / tokens_of(store, corpus))
    assert counts <= {(134, 8, 8), (135, 7, 8)}, "the last single document cannot be in both"
    assert min(shares) >= 1 - LENGTH / tokens_of(store, corpus)


@pytest.mark.parametrize("seed", range(4))
def test_weights_account_for_tokens_beyond_the_window_limit(tmp_path: Path, seed: int) -> None:
    """Tokens drawn, left over and beyond the limit add up to the corpus; so do the weighted tokens of the sets."""
    chance, windows = random.Random(seed), 12
    files = [texts(chance.choice((1, 2, 5, 40, 90)), seed=100 * seed + number) for number in range(8)]
    store = Store(tmp_path / "home")
    corpus = land(store, tmp_path / "files", files)
    pool, tokens = pool_of(store, corpus, windows, seed=seed), tokens_of(store, corpus)
    assert pool.windows > windows
    assert pool.tokens_beyond > 0
    estimated = pool.tokens_used + len(pool.rest) + pool.tokens_beyond
    assert estimated == pytest.approx(tokens, rel=0.03), "by characters"
    assert sum(part.mass for part in pool.parts) + len(pool.rest) == pytest.approx(estimated, rel=1e-9)
    assert all(part.weight >= 1 for part in pool.parts)


def test_the_limit_is_the_plans_windows_and_then_a_shards_share() -> None:
    request = WindowRequest(100, LENGTH)
    assert most_windows(request, 0, 5, 5) == 100
    assert most_windows(request, 99, 1, 1000) == 1
    assert most_windows(request, 130, 200, 1000) == 20
    assert most_windows(request, 130, 1, 10_000) == 1


def test_a_draw_depends_on_shards_and_settings_alone(tmp_path: Path) -> None:
    """Drawing after every landing, once at the end, or again after the draws were lost gives the same sets."""
    lines = in_files(texts(60), 4)
    often, once = Store(tmp_path / "often"), Store(tmp_path / "once")
    for stop in range(1, len(lines) + 1):
        pool_of(often, land(often, tmp_path / "files", lines[:stop]), 10_000)
    corpus = land(once, tmp_path / "files", lines)
    pool = pool_of(once, corpus, 10_000)
    assert pool_of(often, corpus, 10_000) == pool
    for kind, key in list(once.keys("draws")):
        once.discard(kind, key)
    assert pool_of(once, corpus, 10_000) == pool


def test_a_pool_remembers_all_its_sets(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    corpus = land(store, tmp_path / "files", in_files(texts(60, sentences=4), 1))
    pool = pool_of(store, corpus, 10_000)
    parts = all_parts(store, pool)
    assert len(pool.parts) == RECENT < len(parts)
    assert tuple(parts[-RECENT:]) == pool.parts
    assert sum(part.tokens for part in parts) == pool.windows * LENGTH == pool.sums[-1].tokens
    assert functools.reduce(lambda one, other: one.plus(other), parts) == pool.sums[-1]


# --- stored moments --------------------------------------------------------------------------------------------------


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


def grow(
    tmp_path: Path, source: ModelSource, draw: Draw, landings: int, wanted: frozenset[Statistic] = EVERY
) -> tuple[Store, list[Sample], list[int]]:
    """Land files one by one, with a calibration pass and a fold each; return samples and tokens run for each."""
    store, samples, read = Store(tmp_path / "home"), [], []
    cached = dataclasses.replace(dense_cache(store, source), wanted=wanted)
    chance = random.Random(0)
    files = [texts(60, seed=99, sentences=2)]
    files += [texts(chance.choice((4, 9)), seed=number, sentences=2) for number in range(landings)]
    for number in range(len(files)):
        corpus = land(store, tmp_path / f"{number}", [files[number]])
        sample = sample_documents(store, corpus, source, draw)
        read.append(collect(cached, source, sets_to_read(cached, source.blocks, sample)).tokens_read)
        fold(cached, source.blocks, sample)
        samples.append(sample)
    return store, samples, read


def drawn(store: Store, sums: SplitSets) -> list[PoolPart]:
    """Every set that was ever drawn."""
    assert sums.pool is not None
    return all_parts(store, read_pool(store, sums.pool))


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
