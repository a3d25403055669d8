"""Near-duplicates: exact Jaccard similarity decides; sketches are equal in all processes and on all machines."""

from __future__ import annotations

import functools
import itertools

import pytest

from crosscal.progress import silent
from crosscal.selection.distinct import distinct, equal_apart
from crosscal.selection.near_duplicates import NearDuplicates, bands, jaccard, shingles, sketches
from crosscal.selection.texts import DocumentTexts, parts_of
from crosscal.store import Store
from tests.helpers.made_up_text import corpus_of, edited, made_up

SHARES = [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3]
"""Shares of words that are replaced; the similarities range from about 0.95 to 0.1."""
KINDRED = len(SHARES) + 2


def with_edits(count: int, seed: str) -> list[str]:
    """Return documents, each followed by a copy in capitals and by its edited copies."""
    originals = made_up("law", seed, count, words=300)
    groups = [[text, text.upper(), *(edited(text, share, f"{seed} {share}") for share in SHARES)] for text in originals]
    return list(itertools.chain(*groups))


@functools.cache
def plain_shingles(text: str) -> set[tuple[str, ...]]:
    words = "".join(sign if sign.isalnum() else " " for sign in text.lower()).split()
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def plain_jaccard(one: str, other: str) -> float:
    first, second = plain_shingles(one), plain_shingles(other)
    return len(first & second) / len(first | second)


def test_similarity_is_that_of_the_sets_of_five_words() -> None:
    texts = [*with_edits(2, "a"), "Four words, no more.", "four WORDS no more", "Four"]
    for one, other in itertools.combinations(texts, 2):
        assert jaccard(shingles(one), shingles(other)) == plain_jaccard(one, other)
    assert shingles("?!") == {"?!"}  # a text of punctuation alone is still a document


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_every_pair_above_the_threshold_is_found_and_none_below(threshold: float) -> None:
    texts = with_edits(25, "b")
    index = NearDuplicates(threshold, texts.__getitem__)
    for number, sketch in enumerate(sketched := sketches(texts)):
        index.add(number, sketch)
    found = {(a, b) for a, sketch in enumerate(sketched) for b in index.of(sketch, texts[a]) if a < b}
    groups = (range(at, at + KINDRED) for at in range(0, len(texts), KINDRED))
    kindred = itertools.chain(*(itertools.combinations(group, 2) for group in groups))
    expected = {(a, b) for a, b in kindred if plain_jaccard(texts[a], texts[b]) >= threshold}
    assert found <= expected
    assert len(found) >= 0.98 * len(expected) > 20


def test_a_pair_at_the_threshold_is_missed_once_in_a_hundred() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.9, 0.95):
        number, rows = bands(threshold)
        assert number * rows <= 128
        assert 1 - (1 - threshold**rows) ** number >= 0.99
        assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.99  # more hashes per band miss too many


def test_sketches_are_the_same_everywhere() -> None:
    """In all processes (which hash strings differently), Python versions and machines."""
    text = "The river runs past the old mill and on to the sea."
    mine = sketches([text])[0].hashvalues.tolist()
    assert mine[:4] == [698335909, 374759678, 312636647, 103075733]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[DocumentTexts, DocumentTexts]:
    folder = tmp_path_factory.mktemp("corpora")
    store = Store(folder / "home")
    texts = with_edits(20, "c")
    held_out = [*texts[5:90:9], edited(texts[100], 0.004, "d"), *made_up("medicine", "d", 30)]
    pool = corpus_of(store, folder, "pool", {"train": texts, "test": made_up("law", "e", 3)})
    other = corpus_of(store, folder, "other", {"validation": held_out, "test": texts[150:152]})
    return DocumentTexts(store, parts_of([pool], "train")), DocumentTexts(
        store, parts_of([pool, other], "validation", "test")
    )


def plain_choice(pool: list[str], order: list[int], wanted: int, held_out: list[str], threshold: float) -> list[int]:
    chosen: list[int] = []
    for at in order:
        others = itertools.chain(held_out, (pool[one] for one in chosen))
        if len(chosen) < wanted and all(plain_jaccard(pool[at], other) < threshold for other in others):
            chosen.append(at)
    return chosen


@pytest.mark.parametrize(("wanted", "at_once"), [(30, 16_384), (10_000, 16_384), (10_000, 32)])
def test_first_documents_without_near_duplicates_are_chosen(
    corpora: tuple[DocumentTexts, DocumentTexts], wanted: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every chunk size and number of wanted documents."""
    monkeypatch.setattr("crosscal.selection.distinct.MOST_AT_ONCE", at_once)
    pool, held_out = corpora
    order = [(number * 37) % len(pool) for number in range(len(pool))]
    walk = distinct(pool, order, wanted, held_out, 0.6, silent)
    assert walk.chosen == plain_choice(list(pool), order, wanted, list(held_out), 0.6)
    if wanted > len(pool):
        assert len(walk.chosen) + walk.held_out + walk.near_duplicates == len(pool)
        assert walk.held_out > 5 < walk.near_duplicates


def test_without_a_threshold_only_equal_documents_are_left_out(corpora: tuple[DocumentTexts, DocumentTexts]) -> None:
    pool, held_out = corpora
    walk = equal_apart(pool, range(len(pool)), 10_000, held_out)
    assert [pool.text(at) for at in walk.chosen] == [text for text in pool if text not in set(held_out)]
    assert walk.held_out == len(pool) - len(walk.chosen) > 0
