"""Overlap of evaluation text with calibration text: word n-grams, shares and leaks against plain references."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

import pytest

from crosscal.calibration import overlap
from crosscal.calibration.ngrams import WITHOUT_SPACES, ngrams_of
from crosscal.calibration.overlap import overlaps

ALPHABET = "abcABCéßΩж0 1²  \n\t.,;'-_“”ﬁ日本語ไทย\u0301🙂"
WORDS = [f"word{number}" for number in range(60)]


def slow_words(text: str) -> list[str]:
    words, word = [], ""
    for letter in unicodedata.normalize("NFKC", text).casefold():
        if not letter.isalnum():
            words, word = [*words, word], ""
        elif any(first <= ord(letter) <= last for first, last in WITHOUT_SPACES):
            words, word = [*words, word, letter], ""
        else:
            word += letter
    return [each for each in [*words, word] if each]


def slow_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = slow_words(text)
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]


def slow_shares(evaluation: list[str], calibration: list[str], n: int, most: int) -> list[float]:
    held = [set(slow_ngrams(text, n)) for text in calibration]
    shares = []
    for text in evaluation:
        covered: set[int] = set()
        for place, ngram in enumerate(slow_ngrams(text, n)):
            if 1 <= sum(ngram in each for each in held) <= most:
                covered |= set(range(place, place + n))
        shares.append(len(covered) / max(1, len(slow_words(text))))
    return shares


def found_shares(evaluation: list[str], calibration: list[str], **options: Any) -> dict[int, float]:
    """Return document number → share, for shares above 0."""
    (found,) = overlaps(
        (("set", text) for text in evaluation), lambda: (("general", t) for t in calibration), **options
    )
    return {each.number: each.share for each in found.largest}


def made_up(count: int, words: int, seed: int, vocabulary: list[str] = WORDS) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(vocabulary, k=words)) for _ in range(count)]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ngrams_are_those_of_the_plain_reference(n: int) -> None:
    chance = random.Random(n)
    texts = ["", "...", *("".join(chance.choices(ALPHABET, k=chance.randrange(80))) for _ in range(300))]
    for some in (texts, [text for text in texts if text.isascii()]):
        found = ngrams_of(some, n)
        expected = [(number, ngram) for number, text in enumerate(some) for ngram in slow_ngrams(text, n)]
        assert found.words.tolist() == [len(slow_words(text)) for text in some]
        assert found.document_N.tolist() == [number for number, _ in expected]
        numbers = dict(zip((ngram for _, ngram in expected), found.hash_N.tolist(), strict=True))
        assert [numbers[ngram] for _, ngram in expected] == found.hash_N.tolist(), "equal n-grams have equal numbers"
        assert len(set(numbers.values())) == len(numbers), "and others have others"


def test_case_punctuation_and_lines_make_no_difference() -> None:
    text = "The “term” Secretary, means: the Secretary\nof AGRICULTURE — or his (or her) deputy."
    plain = "the term secretary means the secretary of agriculture or his or her deputy"
    assert ngrams_of([text], 3).hash_N.tolist() == ngrams_of([plain], 3).hash_N.tolist()


@pytest.mark.parametrize("most", [1, 2, 10])
def test_shares_are_those_of_the_plain_reference(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = WORDS[:6]
    evaluation, calibration = made_up(9, 30, 1, vocabulary), made_up(12, 40, 2, vocabulary)
    evaluation[3], evaluation[5] = "word1 word2", calibration[0]
    expected = {number: share for number, share in enumerate(slow_shares(evaluation, calibration, 4, most)) if share}
    for batch, held in ((1 << 18, 1 << 22), (1, 1), (200, 60)):
        monkeypatch.setattr(overlap, "BATCH_CHARACTERS", batch)
        found = found_shares(evaluation, calibration, n=4, most_documents=most, most_ngrams=held)
        assert found == pytest.approx(expected)


def test_the_order_of_documents_makes_no_difference() -> None:
    vocabulary = WORDS[:6]
    evaluation, calibration = made_up(9, 30, 1, vocabulary), made_up(12, 40, 2, vocabulary)
    shares = found_shares(evaluation, calibration, n=4, most_documents=3)
    assert found_shares(evaluation, calibration[::-1], n=4, most_documents=3) == shares
    backwards = found_shares(evaluation[::-1], calibration, n=4, most_documents=3)
    assert {8 - number: share for number, share in backwards.items()} == shares


@pytest.mark.parametrize("planted", [0, 5, 12, 13, 20, 79, 80, 81, 100])
def test_a_planted_leak_is_found_if_and_only_if_it_is_long_enough(planted: int) -> None:
    """A document of 100 words shares `planted` consecutive ones with one calibration document, and nothing else."""
    own = [f"own{number}" for number in range(100)]
    before, after = made_up(2, 50, 3)
    calibration = [*made_up(5, 80, 4), f"{before} {' '.join(own[7 : 7 + planted])} {after}", *made_up(5, 80, 5)]
    document = " ".join([*own[7:], *own[:7]])
    sets = overlaps([("law (test)", document)], lambda: (("general", text) for text in calibration))
    (found,) = sets
    planted = min(planted, 93)
    assert found.covered_words == (planted if planted >= 13 else 0)
    assert bool(found.leaked) == (planted >= 80)
    if planted >= 13:
        (worst,) = found.largest
        assert (worst.found_in, worst.found_begins[:20]) == ("general", before[:20])


def test_what_many_documents_have_is_no_leak() -> None:
    formula = " ".join(f"formula{number}" for number in range(40))
    for copies, leaks in ((1, 1), (10, 1), (11, 0)):
        calibration = [f"{text} {formula}" for text in made_up(copies, 20, 6)]
        (found,) = overlaps([("test", formula)], lambda some=calibration: (("general", text) for text in some))
        assert found.leaked == leaks


def test_short_texts_are_counted_and_not_compared() -> None:
    (found,) = overlaps([("test", "two words"), ("test", "")], lambda: [("general", "two words")])
    assert (found.documents, found.too_short, found.words, found.leaked) == (2, 2, 0, 0)
    assert found.share == 0.0


def test_a_sample_of_calibration_documents_is_compared_with_the_others_alone() -> None:
    """A near copy in calibration text is found; the document itself, also in it, does not count as a match."""
    alone, twice = made_up(2, 40, 7)
    calibration = [("general", alone), ("general", twice), ("general", f"{twice} once more"), ("general", alone[:50])]
    texts = [("general (train)", alone), ("general (train)", twice)]
    (found,) = overlaps(texts, lambda: calibration, own={"general (train)"})
    assert [(each.number, each.share) for each in found.largest] == [(1, 1.0)]
    assert found.leaked == 1
