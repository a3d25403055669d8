"""Quality of calibration text: number of documents, and detection of sets that are not text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosscal.calibration import faults, text_quality

VOCABULARY, BEGIN, END = 2000, 0, 1


def windows(tokens: np.ndarray, length: int = 64) -> torch.Tensor:
    whole = len(tokens) // length
    return torch.from_numpy(tokens[: whole * length].reshape(whole, length).astype(np.int64))


def text(tokens: int, seed: int = 0) -> np.ndarray:
    """Tokens with Zipf-distributed frequencies, the most frequent one 6 % of all."""
    shares = 1 / np.arange(3, VOCABULARY + 3)
    return np.random.default_rng(seed).choice(np.arange(2, VOCABULARY + 2), tokens, p=shares / shares.sum())


def documents(*lengths: int) -> np.ndarray:
    parts = [text(length, seed) for seed, length in enumerate(lengths)]
    return np.concatenate([token for part in parts for token in (part, [END])])


def said(tokens_SL: torch.Tensor) -> str:
    return " ".join(faults(text_quality(tokens_SL, VOCABULARY + 2, begin=BEGIN, end=END)))


FAULTY = {
    "distinct": windows(np.tile(text(400), 20)),
    "unique": windows(np.concatenate([np.append(text(60), END)] * 60)),
    "nearly empty": windows(documents(*[4] * 800)),
    "one and the same": windows(np.where(np.arange(8192) % 2, 7, text(8192))),
    "random": windows(np.random.default_rng(0).integers(2, VOCABULARY, 8192)),
}


@pytest.mark.parametrize("word", FAULTY)
def test_what_is_no_text_is_told_and_why(word: str) -> None:
    assert word in said(FAULTY[word])


@pytest.mark.parametrize("tokens", [512, 2048, 16384])
def test_text_has_no_faults(tokens: int) -> None:
    assert said(windows(text(tokens))) == ""
    assert said(windows(documents(*[50] * (tokens // 50)))) == ""


def test_the_more_often_a_set_is_repeated_the_fewer_of_its_4grams_are_distinct() -> None:
    shares = [text_quality(windows(np.tile(text(640), times)), VOCABULARY).distinct_4grams for times in (1, 2, 3, 5, 9)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(shares[0] / 9)


def test_documents_are_counted_whatever_windows_cut() -> None:
    stream = documents(30, 100, 5, 70)
    with_begin = torch.cat([torch.full((len(windows(stream)), 1), BEGIN), windows(stream)], dim=1)
    for tokens_SL, begin in ((windows(stream), None), (with_begin, BEGIN)):
        quality = text_quality(tokens_SL, VOCABULARY, begin=begin, end=END)
        assert (quality.documents, quality.unique_documents) == (4, 4)
    twice = np.concatenate([np.append(text(63), END)] * 3)
    quality = text_quality(windows(twice), VOCABULARY, end=END)
    assert (quality.documents, quality.unique_documents, quality.windows) == (3, 1, 3)


def test_of_a_few_tokens_nothing_is_concluded() -> None:
    assert said(windows(np.full(448, 7))) == ""
    assert "one and the same" in said(windows(np.full(512, 7)))
