"""DSIR and ZIP-FIT scores equal those of a direct implementation of the papers."""

from __future__ import annotations

import gzip
import hashlib
import math
import re
from collections import Counter

import numpy as np
import pytest

from crosscal.files.sizes import compressed_bytes_with
from crosscal.progress import silent
from crosscal.selection import SelectionSettings
from crosscal.selection.choosing import noise, ordered
from crosscal.selection.dsir import HashedGrams, dsir_scores
from crosscal.selection.texts import DocumentTexts, parts_of
from crosscal.selection.zip_fit import MOST_BYTES, zip_fit_scores
from crosscal.store import Store
from tests.helpers.made_up_text import corpus_of, made_up


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[DocumentTexts, DocumentTexts]:
    """A pool in two shards, longer than a batch, and a sample."""
    folder = tmp_path_factory.mktemp("corpora")
    store = Store(folder / "home")
    corpus_of(store, folder, "pool", {"train": made_up("law", "a", 75)})
    pool = corpus_of(
        store, folder, "pool", {"train": [*made_up("medicine", "b", 5), "Été—deux 3x? 'no' — naïve_1 words!"]}
    )
    sample = corpus_of(store, folder, "sample", {"train": made_up("medicine", "c", 9)})
    return DocumentTexts(store, parts_of([pool], "train")), DocumentTexts(store, parts_of([sample], "train"))


def plain_grams(text: str) -> list[str]:
    """Unigrams and bigrams: letters, digits and _ form words, other signs form runs, whitespace ends both."""
    words, kinds = [], []
    for sign in text.lower():
        kind = "space" if sign.isspace() else "word" if re.match(r"\w", sign) else "sign"
        if kind != "space" and kinds and kinds[-1] == kind:
            words[-1] += sign
        elif kind != "space":
            words.append(sign)
        kinds.append(kind)
    return words + [words[at] + " " + words[at + 1] for at in range(len(words) - 1)]


def plain_bucket(gram: str) -> int:
    return int(hashlib.sha256(gram.encode("utf-8")).hexdigest(), 16) % 10000


def plain_weights(pool: list[str], sample: list[str]) -> list[float]:
    frequencies = []
    for texts in (sample, pool):
        counts = Counter(plain_bucket(gram) for text in texts for gram in plain_grams(text))
        frequencies.append({bucket: count / sum(counts.values()) for bucket, count in counts.items()})
    wanted, usual = frequencies
    return [
        math.fsum(
            math.log(wanted.get(bucket, 0) + 1e-8) - math.log(usual.get(bucket, 0) + 1e-8)
            for bucket in map(plain_bucket, plain_grams(text))
        )
        for text in pool
    ]


def test_importance_weights_are_the_papers(corpora: tuple[DocumentTexts, DocumentTexts]) -> None:
    pool, sample = corpora
    score_N, words_N = dsir_scores(pool, sample, silent)
    assert score_N == pytest.approx(plain_weights(list(pool), list(sample)), rel=1e-12)
    assert words_N.tolist() == [(len(plain_grams(text)) + 1) // 2 for text in pool]
    assert HashedGrams()("").tolist() == []


def test_a_document_is_drawn_as_often_as_its_weight_says() -> None:
    """Gumbel top-k: document i is first with probability w_i / Σ w; the second is drawn likewise from the others."""
    score_N, digests = np.log(np.array([1.0, 2.0, 5.0])), [bytes([number]) * 32 for number in range(3)]
    firsts, seconds, draws = Counter(), Counter(), 6000
    for seed in range(draws):
        noise_N = np.array([noise(seed, digest) for digest in digests])
        order = list(ordered(score_N, np.ones(3, dtype=bool), noise_N, SelectionSettings("dsir", 3, seed)))
        firsts[order[0]] += 1
        seconds[tuple(order[:2])] += 1
    for number, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert firsts[number] / draws == pytest.approx(share, abs=4 * math.sqrt(share / draws))
    assert seconds[2, 1] / draws == pytest.approx(5 / 8 * 2 / 3, abs=0.026)


def test_alignments_are_those_of_gzip(corpora: tuple[DocumentTexts, DocumentTexts]) -> None:
    pool, sample = corpora
    targets = [*list(sample)[:3], "x" * (MOST_BYTES + 100)]

    def size(text: str) -> int:
        return len(gzip.compress(text.encode(), 6))

    expected = []
    for document in pool:
        near = []
        for whole in targets:
            target = whole[:MOST_BYTES]
            least, most = sorted([size(document), size(target)])
            near.append(1 - (size(document + target) - least) / most)
        expected.append(math.fsum(near) / len(near))
    assert zip_fit_scores(pool, targets, silent) == pytest.approx(expected, rel=1e-12)


def test_a_text_is_compressed_once_for_all_that_come_behind_it(corpora: tuple[DocumentTexts, DocumentTexts]) -> None:
    pool, _ = corpora
    text, others = "".join(pool).encode(), [b"", b"a", *(one.encode() for one in list(pool)[:5])]
    assert len(text) > 2**15  # longer than gzip's window
    for data in (b"", b"ab", text[:1000], text):
        assert compressed_bytes_with(data, others) == [len(gzip.compress(data + other, 6)) for other in others]


def test_noise_belongs_to_a_document_and_a_seed() -> None:
    draws = [noise(seed, bytes([digest]) * 32) for seed in range(40) for digest in range(100)]
    assert len(set(draws)) == len(draws)
    assert np.mean(draws) == pytest.approx(0.5772, abs=0.1)  # mean of the Gumbel distribution; its variance is π²/6
    assert np.var(draws) == pytest.approx(math.pi**2 / 6, abs=0.25)
    assert noise(3, b"d" * 32) == noise(3, b"d" * 32)


def test_the_documents_of_texts_are_those_of_the_store(corpora: tuple[DocumentTexts, DocumentTexts]) -> None:
    pool, _ = corpora
    texts = list(pool)
    places = [len(texts) - 1, 0, 63, 64, len(texts) - 6, len(texts) - 7]  # both shards, both batches of the first
    assert len(pool) == len(texts) > 65
    assert [pool.text(position) for position in places] == [texts[position] for position in places]
    expected = [hashlib.sha256(text.encode()).digest() for text in texts]
    assert list(pool.digests()) == expected == [pool.digest(position) for position in range(len(texts))]
