"""Document lookup in a corpus: equal to reading every shard, with few reads for any number of shards."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from crosscal.corpora import ingest, load_corpus
from crosscal.corpora.corpus import Shard, digests
from crosscal.corpora.known import KIND, known_splits
from crosscal.store import Store
from tests.helpers.counting_home import counting_store


def text_of(number: int) -> str:
    return f"Document number {number}, which is long enough to be taken for one."


def digest_of_text(number: int) -> bytes:
    return hashlib.sha256(text_of(number).encode()).digest()


ENDS_IN_ZERO = next(number for number in range(9000) if digest_of_text(number).endswith(b"\0"))
"""A document whose digest ends with a byte that numpy takes for padding."""


def write(file: Path, numbers: list[int]) -> str:
    file.write_text("".join(json.dumps({"text": text_of(number)}) + "\n" for number in numbers))
    return str(file)


def every_digest(store: Store, shards: tuple[Shard, ...]) -> dict[bytes, str]:
    return {digest: split for shard in shards for digest, split in digests(store, shard).items()}


@pytest.mark.parametrize("seed", range(2))
def test_it_says_what_reading_every_shard_says(tmp_path: Path, seed: int) -> None:
    chance, store, landed = random.Random(seed), Store(tmp_path / "home"), set[int]()
    for step in range(21):
        numbers = [chance.randrange(1500) for _ in range(chance.choice((1, 3, 90)))] + [ENDS_IN_ZERO] * (step % 5 == 2)
        report = ingest(store, "legal", [write(tmp_path / "new.jsonl", numbers)])
        assert report.added_documents == len(set(numbers) - landed), step
        landed |= set(numbers)
    shards = load_corpus(store, "legal").shards
    expected = every_digest(store, shards)
    assert expected.keys() == {digest_of_text(number) for number in landed}
    asked = [digest_of_text(number) for number in range(2000)]
    for shown in (len(shards), 16, 7, 1, 0):
        here = every_digest(store, shards[:shown])
        assert known_splits(store, shards[:shown], asked) == {one: here[one] for one in asked if one in here}
    assert known_splits(store, shards, []) == {}


def test_an_ingest_reads_few_of_the_earlier_shards(tmp_path: Path) -> None:
    store, asked = counting_store(tmp_path / "home")
    most = 0
    for number in range(40):
        asked.clear()
        ingest(store, "legal", [write(tmp_path / "new.jsonl", [number])])
        is_power = number & (number - 1) == 0  # then many shards are merged into one index, once
        most = most if is_power else max(most, asked["read"] + asked["names"])
    assert most <= 2 * (40).bit_length() + 8


def test_what_is_missing_of_the_index_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    for number in range(9):
        ingest(store, "legal", [write(tmp_path / "new.jsonl", [2 * number, 2 * number + 1])])
    shards = load_corpus(store, "legal").shards
    kept = [key for _, key in store.keys(KIND)]
    assert kept
    for key in kept:
        store.discard(KIND, key)
    asked = [digest_of_text(number) for number in range(18)]
    assert known_splits(store, shards, asked) == every_digest(store, shards)
    report = ingest(store, "legal", [write(tmp_path / "new.jsonl", [0, 7, 100])])
    assert (report.added_documents, report.duplicates) == (1, 2)
