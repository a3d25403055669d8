"""Windows of a growing corpus: each token is drawn once or left over, however the documents are divided among files."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from crosscal.calibration import Pool, WindowRequest
from crosscal.calibration.pool import RECENT, all_parts, draw_pool, most_windows
from crosscal.calibration.sets import windows_by_key
from crosscal.corpora import Corpus, documents
from crosscal.store import Store
from tests.helpers.growing_corpus import LENGTH, land, texts
from tests.helpers.tiny_text import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_disk")


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
